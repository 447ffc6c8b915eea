"""What happens around the training steps: random state, figures for TensorBoard, sample text, checkpoints.

Tags: ``train/loss``, ``train/bpb``, ``val/loss``, ``val/bpb``, ``quant/zero_fraction``, ``quant/flip_rate``,
``train/lr``, ``train/weight_decay``, ``train/grad_norm``, ``perf/...`` (``speed.py``), ``watch/spikes`` (``watch.py``),
histograms ``weights/<layer>`` and ``samples/text``. The step axis counts optimizer steps.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bitnet.checkpoint import damage
from bitnet.data.tokens import UNSAID
from bitnet.generation import Sampling, generate_tokens
from bitnet.layers import low_bit_layers
from bitnet.layers.sharding import share_scales
from bitnet.training.atomic import LAST, copy_atomically
from bitnet.training.interruption import Interruption
from bitnet.training.lit import LitBitNet
from bitnet.training.progress import RunProgress
from bitnet.training.random_state import random_state, set_random_state
from bitnet.training.report import RunReport
from bitnet.training.speed import Speed
from bitnet.training.tensorboard import CUSTOM_SCALARS, SAMPLE, text_image
from bitnet.training.watch import Watch


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The SummaryWriter of the run, or None when there is no TensorBoard logger (or this is not rank 0)."""
    logger = trainer.logger
    return logger.experiment if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero else None


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    if trainer.logger is not None:
        trainer.logger.log_metrics(metrics, step=trainer.global_step)


class RandomState(Callback):
    """Saves and restores every random generator, so that a resumed run draws the same dropout masks.

    Restored before the first batch, since setting up a run draws numbers too.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._state is not None:
            set_random_state(self._state)
            self._state = None


def is_log_step(trainer: L.Trainer, step: int) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (every > 0 and step % every == 0) or step in (1, trainer.max_steps)


class TrainingMetrics(Callback):
    """Loss, schedule, gradient norm and speed, every ``trainer.log_every_n_steps``."""

    def __init__(self) -> None:
        self._speed = Speed()
        self._losses: list[Tensor] = []
        """Of the batches of this step, as parts of their mean."""

    def on_train_start(self, trainer: L.Trainer, pl_module: LitBitNet) -> None:  # type: ignore[override]
        if writer := tensorboard(trainer):
            writer.add_custom_scalars(CUSTOM_SCALARS)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._speed.start()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitBitNet, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self._speed.stop(batch["inputs"].numel())
        self._losses.append(outputs["loss"].detach())
        if not pl_module.steps_now:
            return
        losses, self._losses = self._losses, []
        if not is_log_step(trainer, trainer.global_step):
            return
        loss = float(torch.stack(losses).mean()) * trainer.accumulate_grad_batches
        group = pl_module.optimizers(use_pl_optimizer=False).param_groups[0]  # type: ignore[union-attr]
        metrics = {
            "train/loss": loss,
            "train/bpb": loss / math.log(2) / pl_module.data.tokens.bytes_per_token(),
            "train/lr": float(group["lr"]),
            "train/weight_decay": group["weight_decay"],
            "train/grad_norm": float(pl_module.grad_norm),
        }
        log_metrics(trainer, metrics | self._speed.figures(trainer, pl_module))


class QuantMetrics(Callback):
    """Zero fraction and flip rate of the trits, and a histogram of them per layer at each validation.

    The flip rate is the share of quantized weights that one optimizer step has changed.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    @staticmethod
    def quantized(pl_module: LitBitNet) -> dict[str, Tensor]:
        """int8 weights by layer name: of a spread model the pieces that are here, but every rank must call this."""
        layers = low_bit_layers(pl_module.transformer)
        if pl_module.is_spread:
            share_scales(layers.values())
            return {name: layer.local_levels() for name, layer in layers.items()}
        return {name: layer.quantized_weight()[0] for name, layer in layers.items()}

    @staticmethod
    def totals(pl_module: LitBitNet, counts: list[Tensor]) -> Tensor:
        """Counts (n, m) int64 of all pieces together."""
        found = torch.stack(counts)
        if pl_module.is_spread:
            torch.distributed.all_reduce(found)
        return found

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: LitBitNet, optimizer: Any) -> None:  # type: ignore[override]
        if is_log_step(trainer, trainer.global_step + 1):
            self._before = self.quantized(pl_module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitBitNet, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._before:
            return
        after = self.quantized(pl_module)
        counts = [
            torch.stack(((q == 0).sum(), (q != self._before[name]).sum(), torch.tensor(q.numel(), device=q.device)))
            for name, q in after.items()
        ]
        zeros, flips, weights = self.totals(pl_module, counts).sum(0).tolist()
        log_metrics(trainer, {"quant/zero_fraction": zeros / weights, "quant/flip_rate": flips / weights})
        self._before = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: LitBitNet) -> None:  # type: ignore[override]
        quantized = self.quantized(pl_module)
        if not quantized:
            return
        counts = self.totals(pl_module, [torch.stack([(q == v).sum() for v in (-1, 0, 1)]) for q in quantized.values()])
        if writer := tensorboard(trainer):
            for name, shares in zip(quantized, counts.tolist(), strict=True):
                _write_histogram(writer, f"weights/{name}", shares, trainer.global_step)


def _write_histogram(writer: Any, tag: str, shares: list[int], step: int) -> None:
    """Counts of -1, 0 and +1 as a histogram of three bins."""
    edges = (-0.5, 0.5, 1.5)
    sums = {"num": sum(shares), "sum": shares[2] - shares[0], "sum_squares": shares[0] + shares[2]}
    writer.add_histogram_raw(
        tag, min=-1.0, max=1.0, bucket_limits=edges, bucket_counts=shares, global_step=step, **sums
    )


class SampleText(Callback):
    """Continues a line of the validation text at each validation, in the terminal and in TensorBoard."""

    PROMPT_TOKENS = 8

    def __init__(self, max_new_tokens: int = 60) -> None:
        self.max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: L.Trainer, pl_module: LitBitNet) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.world_size > 1:
            return
        tokenizer = pl_module.data.tokenizer
        length = min(self.PROMPT_TOKENS, pl_module.config.max_seq_len // 2)
        prompt = [int(i) % UNSAID for i in pl_module.data.tokens.ids("val")[:length]]
        room = pl_module.config.max_seq_len - len(prompt)
        model = pl_module.transformer
        length, eos_id = min(self.max_new_tokens, room), pl_module.data.tokens.eos_id
        # Compiled blocks would be compiled anew for each layer of a cache, until the compiler gives them up for good.
        with torch.compiler.set_stance("force_eager") if pl_module.compile_blocks else nullcontext():
            ids = list(generate_tokens(model, prompt, length, Sampling(), eos_id))
        text, start = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
        progress = trainer.progress_bar_callback
        if isinstance(progress, RunProgress):
            shown = " ".join(text.split())
            progress.print(f"  {shown[:400]}", style="italic dim", markup=False)
        if writer := tensorboard(trainer):
            step = trainer.global_step
            writer.add_text("samples/text", f"**{start}**{text.removeprefix(start)}", step)
            writer.add_image(SAMPLE, text_image(text, f"step {step}"), step, dataformats="HWC")


class LastCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt`` every ``every_n_train_steps``, at the end of the run, and when somebody ends it."""

    def __init__(self, every_n_train_steps: int = 100) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitBitNet, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.steps_now:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: under another name of its folder, the file would be taken for an older one, and be removed as soon
        as it is written."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save now, unless this step has been saved; not to be called inside a window of accumulation."""
        if self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(Path(self.dirpath or ".") / LAST)
            self._last_global_step_saved = trainer.global_step


class BestCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt``: the one with the lowest validation loss."""

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/loss", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also what best.ckpt says of itself: it may be newer than the checkpoint that the run goes on from, which is
        saved before the validation of its step, or be in a folder that has another name now: that goes by it alone."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)
        file = Path(self.dirpath or ".") / f"{self.filename}.ckpt"
        if not file.is_file() or damage(file):
            return
        said = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        try:
            score = said["callbacks"][self.state_key]["best_model_score"]
        except (KeyError, TypeError):  # not of a run
            return
        if score is not None and (self.best_model_score is None or score < self.best_model_score):
            self.best_model_score = self.kth_value = score.clone()  # lets go of the file
            self.best_model_path = self.kth_best_model_path = str(file)
            self.best_k_models = {str(file): self.kth_value}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "validate":
            return
        # All that was left of a run: what it would save now, it saved as its last.
        last, loss = Path(self.dirpath or ".") / LAST, trainer.callback_metrics["val/loss"]
        if last.is_file() and (self.best_model_score is None or loss < self.best_model_score):
            copy_atomically(last, last.with_name(f"{self.filename}.ckpt"))


def with_defaults(own: list[Callback], *, checkpoints: bool, progress: bool) -> list[Callback]:
    """The callbacks of a run: ``own`` ones of a config, and those of every run that none of them replaces.

    Without ``checkpoints`` or ``progress`` the config's are left out, too, as the trainer would refuse them.
    """
    defaults: list[Callback] = [
        RandomState(),
        Watch(),
        Interruption(),
        RunProgress(),
        TrainingMetrics(),
        QuantMetrics(),
        SampleText(),
        RunReport(),
        BestCheckpoint(),
    ]
    kinds = {type(callback) for callback in own}
    last = [] if any(isinstance(callback, LastCheckpoint) for callback in own) else [LastCheckpoint()]
    unwanted = (*((Checkpoint,) if not checkpoints else ()), *((ProgressBar,) if not progress else ()))
    wanted = [*own, *last, *(callback for callback in defaults if type(callback) not in kinds)]
    return [callback for callback in wanted if not isinstance(callback, unwanted)]
