"""What a run was trained with, kept in its checkpoints, and what is different when it goes on.

A setting that decides a step may change on purpose, so the run goes on with a warning that names it; what would make
another model of it is refused. Bits are promised for equal settings on an equal machine only, so threads, torch's
version and the CPU's instructions are kept as well.
"""

from typing import Any

import torch

from bitnet.errors import UserError
from bitnet.layers.fake_quantized_linear import State

Plain = dict[str, Any]

WITHOUT_EFFECT = (
    *("ckpt_path", "overwrite", "seed_everything", "model.init_from", "model.calibration_rows"),
    "model.optim.kind",
    *("data.path", "data.val_path", "data.val_batch_size", "data.workers", "data.cache_dir", "data.tokenizer"),
    *("trainer.default_root_dir", "trainer.logger", "trainer.callbacks", "trainer.profiler", "trainer.log_every_n"),
    *("trainer.enable_", "trainer.val_check", "trainer.limit_val", "trainer.limit_test", "trainer.limit_predict"),
    *("trainer.num_sanity", "trainer.check_val", "trainer.model_registry", "trainer.max_time", "trainer.fast_dev_run"),
)
"""Beginnings of the names of settings that change no step behind a checkpoint, or are looked at by other means: text
and tokenizer by their content, the optimizer by its state, random numbers because their state is restored."""

DECIDES_THE_MODEL = (
    "model.recipe.class_path",
    *(
        f"model.recipe.init_args.{name}"
        for name in (
            *("weight", "scale_per", "learned_scale", "rank", "ranges", "group_size"),
            *("bits", "symmetric", "quantizer", "act_scale"),
        )
    ),
)
"""Another value makes another model, for which ``model.init_from`` begins a new run."""


def record_of(config: Plain, text: list[str]) -> dict[str, Plain]:
    """Plain values for a checkpoint: a run's nested ``config``, the digests of its text, and this machine."""
    environment = {
        "torch": str(torch.__version__),  # a class of its own, no plain value
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return {"settings": {**flat(config), "data": ", ".join(text)}, "environment": environment}


def flat(config: Any, prefix: str = "") -> Plain:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists are values."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {
        name: value for key, sub in config.items() for name, value in flat(sub, f"{prefix}.{key}".strip(".")).items()
    }


def changes(old: dict[str, Plain], new: dict[str, Plain], integers: State | None) -> list[str]:
    """A line for each setting that was another one; ``old`` and ``new`` are of ``record_of``, ``integers`` is the state
    of the layers of a post-training recipe.

    Raises ``UserError`` where the run cannot go on with it.
    """
    before, now = old["settings"], new["settings"]
    lines = []
    for name in [*now, *(name for name in before if name not in now)]:
        # What one of two versions does not know has its default there.
        if name not in before or name not in now or before[name] == now[name]:
            continue
        if name in DECIDES_THE_MODEL and not (integers == "latent" and name.endswith(".bits")):  # a grid of each step
            start = "from its weights with model.init_from" if integers is None else "from the float model"
            raise UserError(
                f"--ckpt_path: {name} = {now[name]}, but the run has {before[name]}; begin a new run {start}."
            )
        if not name.startswith(WITHOUT_EFFECT):
            shown = [str(value[name])[:24] if name == "data" else value[name] for value in (now, before)]
            what = "data.path: sha256 of the text" if name == "data" else name
            lines.append(f"{what} = {shown[0]}, but {shown[1]} when the checkpoint was saved")
    for name, value in new["environment"].items():
        if old["environment"].get(name) != value:
            was = old["environment"].get(name)
            lines.append(f"{name} = {value}, but {was} when the checkpoint was saved: bits will differ")
    return lines
