"""``FitCLI``: what one call of ``fit`` does, from a parsed config to a trained model in a run folder.

New runs get a folder of their own, resumed ones are found, and whatever can be wrong is said before a folder is made.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from bitnet.training.without_triton import triton_unseen_without_gpu

with triton_unseen_without_gpu():
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from bitnet.checkpoint import build, check_fits, find_checkpoint, is_float, read_checkpoint, weights_digest
from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.progress import PreparationProgress
from bitnet.recipes import PostTraining
from bitnet.recipes.distillation import Taught
from bitnet.training.atomic import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    move_over,
    remove_partial_files,
    write_text_atomically,
)
from bitnet.training.callbacks import RandomState, with_defaults
from bitnet.training.changes import changes, record_of
from bitnet.training.optim import check_same_kind
from bitnet.training.report import RunReport
from bitnet.training.run_folder import (
    find_run,
    is_first_process,
    is_free,
    new_run_folder,
    set_aside,
    settle,
    warn,
)
from bitnet.training.tensorboard import RunLogger
from bitnet.training.trainer_checks import check_trainer

KEEP_LOW_BITS = "to go on with low bits set model.recipe.quantize_from = 0 and quantizer_warmup = 0"


class FitCLI(LightningCLI):
    """``fit`` with run folders: new ones are numbered, resumed ones are found."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--overwrite", action="store_true", help="Replace an earlier run in the same folder.")
        parser.link_arguments("data.vocab_size", "model.config.vocab_size")
        parser.link_arguments("data.seq_len", "model.config.max_seq_len")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,
                "trainer.default_root_dir": "runs/run",
                "trainer.check_val_every_n_epoch": None,
                "trainer.num_sanity_val_steps": 0,
                "trainer.logger": True,
                "model.recipe": {"class_path": "bitnet.recipes.BitNet"},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no hyper-parameters that could override the config: nothing to parse."""

    def before_instantiate_classes(self) -> None:
        self._replaced: Path | None = None
        config = self.config.fit
        root = Path(config.trainer.default_root_dir or "runs/run").expanduser()
        root = root if root.name.strip(".") else root.resolve()  # of "." and ".."
        self.ckpt_path: Path | None = None
        if config.ckpt_path:
            self.run_folder, self.ckpt_path = find_run(root, config.ckpt_path)
            config.ckpt_path = str(self.ckpt_path)
        else:
            self.run_folder = root
        self._saved_config = self.parser.dump(self.config, skip_none=False)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer of ``fit``. Everything that can be wrong is looked at here, before a run folder exists."""
        self.model.check_recipe()
        self.model.resumes = self.ckpt_path is not None
        self._check_others()
        if self.ckpt_path is None and is_first_process():
            self._choose_folder()
        try:
            trainer: Any = super().instantiate_trainer(**kwargs | self._parts_of_trainer())
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        check_trainer(trainer)
        # Others look at the random state, so it is restored before their turn; those of a config would come first.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RandomState))
        return trainer

    def _check_others(self) -> None:
        """Prepare the tokens, and refuse a model, a text and settings that do not go with each other, with the
        checkpoint that the run goes on from, or with the one that it starts from."""
        self.model.calibration_progress = self.datamodule.progress = PreparationProgress()
        others = {"--ckpt_path": self.ckpt_path, "model.init_from": self.model.init_from}
        old, parent = (read_checkpoint(path) if path else None for path in others.values())
        if parent and self.model.recipe.needs_parent:
            self._adopt(parent["bitnet"])
        self.model.check_sizes(self.datamodule)
        store = self.datamodule.prepare_tokens()
        model_config = replace(self.model.config, vocab_size=store.vocab_size)
        for content, (option, path) in zip((old, parent), others.items(), strict=True):
            if content:
                check_fits(content["bitnet"], model_config, store.tokenizer.to_str(), f"{option} {path}")
        if parent and not old:
            self._warn_of_float(parent["bitnet"])
        steps = self.config.fit.trainer.max_steps
        if steps > 0 and (low := self.model.recipe.blend(steps, steps)) < 1:
            warn(f"the run ends after {steps} steps, when quantizer_warmup has brought {low:.0%} of the low bits")
        self.model.record = record_of(self._plain_config(), self.datamodule.summary()["sha256"])
        if parent and isinstance(self.model.recipe, Taught):
            self.model.record["settings"]["teacher"] = weights_digest(parent["state_dict"])[:12]
        if old and old["bitnet"].get("inside_window"):
            warn(
                f"--ckpt_path {self.ckpt_path} was saved inside a window of accumulation; its batches do not come again"
            )
        if old:
            self._check_record(old["bitnet"].get("record"), old.get("global_step", 0))
            for saved in old.get("optimizer_states", []):
                check_same_kind(saved, self.model.optim)

    def _choose_folder(self) -> None:
        """The folder of a new run: numbered, or with ``--overwrite`` the one that is there."""
        self.run_folder = new_run_folder(self.run_folder, self.config.fit.overwrite)
        parent = self.model.init_from
        if parent and Path(parent).resolve().is_relative_to(self.run_folder.resolve()):
            raise UserError(
                f"--overwrite: model.init_from = {parent} is of the run that would be replaced; choose another "
                "trainer.default_root_dir."
            )

    def _parts_of_trainer(self) -> dict[str, Any]:
        """What every run has beside what its config asks for."""
        asked, made = self.config.fit.trainer, self.config_init.fit.trainer

        def listed(value: Any) -> list[Any]:
            return value if isinstance(value, list) else [value] if value else []

        parts = {
            "default_root_dir": str(self.run_folder),
            "plugins": [AtomicCheckpointIO(), *listed(made.plugins)],
            "callbacks": with_defaults(
                [*listed(made.callbacks), Replacement(self)],
                checkpoints=asked.enable_checkpointing is not False,
                progress=asked.enable_progress_bar is not False,
            ),
        }
        return parts | ({"logger": RunLogger(self.run_folder, name="", version="")} if asked.logger is True else {})

    def _check_record(self, old: dict[str, Any] | None, step: int) -> None:
        """Name every setting that is not what it was when the checkpoint of ``step`` was saved."""
        if not old:  # older checkpoints say nothing
            return
        recipe = self.model.recipe
        lines = changes(old, self.model.record, recipe.state() if isinstance(recipe, PostTraining) else None)
        before, now = (
            self.model.recipe.blend(step, total)
            if (total := record["settings"].get("trainer.max_steps", -1)) > 0
            else 1.0
            for record in (old, self.model.record)
        )
        if now < before:
            lines.append(
                f"of {self.config.fit.trainer.max_steps} steps, step {step} is one at which this recipe trains "
                f"{1 - now:.0%} in float; {KEEP_LOW_BITS}"
            )
        for line in lines:
            warn(line)

    def _warn_of_float(self, parent: dict[str, Any]) -> None:
        """Training a low-bit model on with a recipe that begins in float undoes what its weights are adapted to."""
        if self.model.recipe.begins_in_float and not is_float(parent):
            warn(
                f"model.init_from = {self.model.init_from} is a low-bit model, which this recipe trains in float "
                f"first; {KEEP_LOW_BITS}"
            )

    def _plain_config(self) -> dict[str, Any]:
        """What was set, as nested plain values."""
        saved: dict[str, Any] = yaml.safe_load(self._saved_config)
        saved = saved.get("fit", saved)
        saved.pop("config", None)
        return saved

    def _adopt(self, parent: dict[str, Any]) -> None:
        """Take sizes and tokenizer from the model that the recipe starts from, so that nobody has to repeat them."""
        self.model.check_is_float(parent, self.model.init_from)
        asked, (self.model.config, _) = self.model.config.dropout, build(parent)
        if asked != ModelConfig.dropout:  # no part of what the parent is
            self.model.config = replace(self.model.config, dropout=asked)
        tokenizer = find_checkpoint(self.model.init_from).parent.parent / "tokenizer.json"
        if self.datamodule.tokenizer_path is None and tokenizer.is_file():
            self.datamodule.tokenizer_path = str(tokenizer)
            self.datamodule.eos_token = self.datamodule.eos_token or parent.get("eos_token")

    def before_fit(self) -> None:
        self.model.check_strategy(self.trainer.strategy)
        if is_first_process():
            self._make_run_folder()

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            self._settle(failed=True)
            raise
        self._settle(failed=False)

    def _settle(self, failed: bool) -> None:
        """The run that this one replaces: gone, or back where this one ``failed`` before it had saved anything."""
        if self._replaced is not None:
            settle(self._replaced, self.run_folder, failed)
            self._replaced = None

    def after_fit(self) -> None:
        """A run that was stopped between its last step and the validation after it has only that left to do."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, RunReport) and callback.waits_for_validation for callback in callbacks):
            self.trainer.validate(self.model, self.datamodule, verbose=False)

    def _make_run_folder(self) -> None:
        if self.ckpt_path is None and not is_free(self.run_folder):
            if not self.config.fit.overwrite:
                raise UserError(
                    f"{self.run_folder}: another run has begun there in the meantime; start this one again."
                )
            self._replaced = set_aside(self.run_folder)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        checkpoints = self.run_folder / "checkpoints"
        for folder in (self.run_folder, checkpoints, self.run_folder / "incidents"):
            remove_partial_files(folder)
        if self.ckpt_path == checkpoints / PREVIOUS and (checkpoints / LAST).exists():
            # What is damaged must not become the previous one with the next save.
            move_over(checkpoints / LAST, checkpoints / "damaged.ckpt")
        self._write_config()
        tokenizer = self.datamodule.tokens.folder / "tokenizer.json"
        write_text_atomically(tokenizer.read_text(encoding="utf-8"), self.run_folder / "tokenizer.json")

    def _write_config(self) -> None:
        saved = self._plain_config()
        saved["ckpt_path"] = None
        saved["overwrite"] = False
        saved["trainer"]["default_root_dir"] = str(self.run_folder)
        if self.model.recipe.needs_parent:
            saved["model"]["config"] = asdict(self.model.config)
            saved["data"]["tokenizer"] = self.datamodule.tokenizer_path
        write_text_atomically(yaml.safe_dump(saved, sort_keys=False), self.run_folder / "config.yaml")


class Replacement(Callback):
    """Removes the run that was replaced as soon as the new one has saved."""

    def __init__(self, cli: FitCLI) -> None:
        self.cli = cli

    def on_train_batch_end(self, *_: Any) -> None:
        if self.cli._replaced and (self.cli.run_folder / "checkpoints" / LAST).exists():
            self.cli._settle(failed=False)
