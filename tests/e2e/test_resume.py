"""Nothing lost: a run that is stopped or killed at any moment ends with the bits of one that was not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet.checkpoint import load_checkpoint, read_checkpoint
from bitnet.training.callbacks import BestCheckpoint
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet

from ..conftest import tiny_options
from ..runs import STREAM, WINDOW, WORKERS, run_digest, run_python

BLENDED = (  # as the presets do; stops before, in and behind the blend, and in the decay with 4-bit activations
    *("--model.optim.kind=muon", "--model.schedule.kind=wsd", "--model.recipe.quantize_from=0.1"),
    *("--model.recipe.quantizer_warmup=0.4", "--model.recipe.act4_from=0.6"),
)
EPOCHS = ("--trainer.max_epochs=9",)  # Lightning asks for the length of the data before it restores a place in it


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="rows"),
        pytest.param(STREAM, id="stream"),
        pytest.param(EPOCHS, id="epochs"),
        pytest.param(BLENDED, id="blended"),
        pytest.param((*STREAM, *WINDOW, *WORKERS), id="both-workers"),
        pytest.param(WINDOW, id="window", marks=pytest.mark.slow),
        pytest.param((*STREAM, *WINDOW), id="both", marks=pytest.mark.slow),
        pytest.param(WORKERS, id="rows-workers", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(texts, tmp_path, run_fit, options) -> None:
    steps = 30  # 60 batches of 4 rows an epoch, fewer with accumulation: stops fall inside and between epochs
    alone = tuple(option for option in options if option not in WORKERS)
    run_fit(texts, tmp_path / "whole", f"--trainer.max_steps={steps}", *alone)
    folder = tmp_path / "parts"
    run_fit(texts, folder, f"--trainer.max_steps={steps}", *options, "--trainer.limit_train_batches=1.0")
    content = read_checkpoint(folder)
    assert content["global_step"] == steps
    for stop in (1, 7, 20):
        parts = tmp_path / f"parts{stop}"
        _stop_after(stop, texts, parts, steps, options)
        assert read_checkpoint(parts)["global_step"] == stop
        run_fit(texts, parts, f"--trainer.max_steps={steps}", *(alone if stop == 7 else options), "--ckpt_path=last")
        assert run_digest(parts) == run_digest(tmp_path / "whole"), stop


def test_a_stop_inside_the_first_window_after_a_resume_loses_no_batch(texts, tmp_path, run_fit) -> None:
    """A save there would count batches as done whose gradients are gone with the process."""
    run_fit(texts, tmp_path / "whole", "--trainer.max_steps=12", *WINDOW)
    _stop_after(7, texts, tmp_path / "parts", 12, WINDOW)
    _stop_after(7, texts, tmp_path / "parts", 12, (*WINDOW, "--ckpt_path=last"), inside_window=True)
    run_fit(texts, tmp_path / "parts", "--trainer.max_steps=12", *WINDOW, "--ckpt_path=last")
    assert run_digest(tmp_path / "parts") == run_digest(tmp_path / "whole")


WIDE = ("--model.config.dim=64", "--model.config.ffn_dim=128")  # 8-bit moments begin at 4,096 parameters


@pytest.mark.parametrize("kind,lr,decay", [("muon", 5e-3, 0.1), ("adafactor", 0.05, 0.0), ("adamw8bit", 5e-3, 0.1)])
def test_every_optimizer_learns_and_resumes_with_the_same_bits(texts, tmp_path, run_fit, kind, lr, decay) -> None:
    """With the other switches that save memory, so that dropout, schedule and recomputation are restored together."""
    optim = (f"--model.optim.kind={kind}", f"--model.optim.lr={lr}", f"--model.optim.weight_decay={decay}")
    switches = ("--model.loss_chunk=50", "--model.activation_checkpointing=true")
    options = (*WIDE, *optim, *switches)
    run_fit(texts, tmp_path / "whole", "--trainer.max_steps=30", *options)
    figures = json.loads((tmp_path / "whole" / "summary.json").read_text())["figures"]
    assert figures["val/loss"] < 5.0  # ln 300 = 5.7 at first
    _stop_after(11, texts, tmp_path / "parts", 30, options)
    run_fit(texts, tmp_path / "parts", "--trainer.max_steps=30", *options, "--ckpt_path=last")
    assert run_digest(tmp_path / "parts") == run_digest(tmp_path / "whole")


def test_a_run_killed_before_its_last_validation_has_only_that_left(texts, tmp_path, run_fit) -> None:
    """Its last checkpoint is there, so no step follows; the figures are those of a run that was left alone."""
    options = (
        "--trainer.max_steps=12",
        "--trainer.val_check_interval=12",
        "--trainer.callbacks.every_n_train_steps=12",
    )
    run_fit(texts, tmp_path / "whole", *options)
    stop = "--trainer.callbacks+=tests.training.stopping.StopBeforeValidation"
    run_python("train.py", *tiny_options(texts, tmp_path / "killed"), *options, stop, code=7)
    assert not (tmp_path / "killed" / "summary.json").exists()
    run_fit(texts, tmp_path / "killed", *options, "--ckpt_path=last")
    whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    for figure in ("val/loss", "val/bpb", "train/loss"):
        assert killed["figures"][figure] == whole["figures"][figure]
    assert killed["steps"] == 12 and killed["best_val_bpb"] == whole["best_val_bpb"]
    best, expected = (load_checkpoint(tmp_path / n / "checkpoints/best.ckpt")[0] for n in ("killed", "whole"))
    assert all(torch.equal(w, expected.get_parameter(name)) for name, w in best.named_parameters())


@pytest.mark.parametrize("renamed", [False, True])
def test_a_better_model_is_not_overwritten_after_a_resume(texts, tmp_path, run_fit, renamed) -> None:
    """best.ckpt of a validation that the checkpoint knows nothing of: that was saved before it, or elsewhere."""
    folder = tmp_path / "run"
    run_fit(texts, folder, "--trainer.max_steps=8", "--trainer.val_check_interval=8")
    loss = json.loads((folder / "summary.json").read_text())["figures"]["val/loss"]
    resumed = BestCheckpoint()
    state = read_checkpoint(folder / "checkpoints/last.ckpt")["callbacks"][resumed.state_key]
    if renamed:
        folder = folder.rename(tmp_path / "elsewhere")
    else:
        worse = torch.tensor(loss + 1)
        state |= {"best_model_score": worse, "kth_value": worse, "best_k_models": {state["best_model_path"]: worse}}
    resumed.dirpath = str(folder / "checkpoints")
    resumed.load_state_dict(state)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda decision: decision))
    assert not resumed.check_monitor_top_k(trainer, torch.tensor(loss + 0.01))
    assert resumed.check_monitor_top_k(trainer, torch.tensor(loss - 0.01))


def test_a_longer_run_that_goes_back_to_float_says_so(texts, tmp_path, run_fit, capsys) -> None:
    """10 steps, low bits from the fourth on; step 10 of 40 is before the 16th."""
    late = ("--model.recipe.quantize_from=0.4",)
    said = "of 40 steps, step 10 is one at which this recipe trains 100% in float; to go on with low bits set"
    for options, warned in (((), True), (("--model.recipe.quantize_from=0",), False)):
        run_fit(texts, folder := tmp_path / str(warned), "--trainer.max_steps=10", *late)
        capsys.readouterr()
        run_fit(texts, folder, *late, *options, "--trainer.max_steps=40", "--ckpt_path=last")
        assert (said in capsys.readouterr().err) == warned


def test_seconds_are_those_of_the_whole_run(texts, tmp_path, run_fit, capsys) -> None:
    def seconds() -> float:
        return json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]

    run_fit(texts, tmp_path / "run", "--trainer.max_steps=30")
    first = seconds()
    for _ in range(2):  # nothing is left to do
        run_fit(texts, tmp_path / "run", "--trainer.max_steps=30", "--ckpt_path=last")
        assert seconds() > 0.7 * first > 0  # the last validation comes behind the last checkpoint
    assert ", 30 in" in capsys.readouterr().out


def test_the_state_of_another_optimizer_is_refused_in_one_line(texts, tmp_path, run_fit, capsys) -> None:
    run_fit(texts, tmp_path / "run", "--trainer.max_steps=2")
    options = ["--model.optim.kind=muon", "--trainer.max_steps=4", "--ckpt_path=last"]
    assert fit([*tiny_options(texts, tmp_path / "run"), *options]) == 2
    expected = "error: ckpt_path: that run used optim.kind = adamw, not muon; its state does not fit."
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected


@pytest.mark.parametrize("options", [(), (*STREAM, "--data.workers=1")], ids=["rows", "stream"])
def test_a_run_that_goes_on_with_other_rows_a_step_sees_the_next_row(
    texts, tmp_path, run_fit, monkeypatch, options
) -> None:
    """10 steps of 4 rows, 5 of 8, 8 of 3: the first 104 rows of one run of 4 (26 steps), in its order."""
    seen: list[torch.Tensor] = []
    original = LitBitNet.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(batch["inputs"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitBitNet, "training_step", training_step)
    last = ()
    for steps, rows in ((10, 4), (15, 8), (23, 3)):
        run_fit(texts, tmp_path / "run", f"--trainer.max_steps={steps}", f"--data.batch_size={rows}", *options, *last)
        last = ("--ckpt_path=last",)
    changed, seen[:] = torch.cat(seen), []
    run_fit(texts, tmp_path / "whole", "--trainer.max_steps=26", *options)
    assert torch.equal(changed, torch.cat(seen))


class Stop(Exception):
    """Ends a run from within, after a number of optimizer steps."""


def _stop_after(
    stop: int, text: Path, folder: Path, steps: int, options: tuple[str, ...], inside_window: bool = False
) -> None:
    """Train until ``stop`` optimizer steps are done and, ``inside_window``, some of the batches of the next."""
    from bitnet.training.callbacks import LastCheckpoint

    original = LastCheckpoint.on_train_batch_end

    def stopping(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == stop and trainer.fit_loop._should_accumulate() is inside_window:
            raise Stop

    LastCheckpoint.on_train_batch_end = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            fit([*tiny_options(text, folder), f"--trainer.max_steps={steps}", *options])
    finally:
        LastCheckpoint.on_train_batch_end = original  # type: ignore[method-assign]
