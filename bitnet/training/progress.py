"""What a user sees while a run is under way: one Rich line with loss, bits per byte, tokens/s and time left.

On something that is not a terminal, a plain line is printed at most every ``PLAIN_SECONDS``.
"""

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitnet.progress import run_console
from bitnet.training.strategies import data_parallel_size

PLAIN_SECONDS = 10.0


def say(trainer: L.Trainer, line: str) -> None:
    """Print a line above the bar, in the first process."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(line, markup=False)


class RunProgress(ProgressBar):
    """Step, loss, bits per byte, tokens/s and time left; other output is printed above the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.console = run_console()
        self._enabled = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_print = 0.0
        self._window: list[tuple[float, int]] = []

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            (self._bar.console if self._bar else self.console).print(*args, **kwargs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_print = time.monotonic()
        if not (self._enabled and self.console.is_terminal):
            return
        columns = (
            BarColumn(bar_width=24),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console)
        total = int(trainer.estimated_stepping_batches)
        self._task = self._bar.add_task("fit", total=total, completed=trainer.global_step, figures="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        tokens = batch["inputs"].numel() * data_parallel_size(trainer)
        self._window = [*self._window[-49:], (now, tokens)]
        due = self._bar is not None or now - self._last_print >= PLAIN_SECONDS
        if not self._enabled or not due or (self._bar is not None and batch_idx % 5):
            return
        figures = self._figures(trainer, pl_module, float(outputs["loss"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, figures=figures)
        else:
            self._last_print = now
            total = int(trainer.estimated_stepping_batches)
            left = self._seconds_left(trainer.global_step, total)
            self.print(f"step {trainer.global_step}/{total}  {figures}  {left} left")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window = []  # time spent validating is not training time

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window = []
        metrics = trainer.callback_metrics
        if "val/loss" in metrics and not trainer.sanity_checking:
            loss, bpb = float(metrics["val/loss"]), float(metrics["val/bpb"])
            self.print(f"step {trainer.global_step}: validation loss {loss:.4f}, {bpb:.4f} bits per byte", style="bold")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)
            self._bar.stop()
            self._bar = None

    def tokens_per_second(self) -> float:
        """Over the last 50 batches; NaN before there are two."""
        if len(self._window) < 2:
            return math.nan
        return sum(n for _, n in self._window[1:]) / max(self._window[-1][0] - self._window[0][0], 1e-9)

    def _figures(self, trainer: L.Trainer, pl_module: Any, loss: float) -> str:
        loss *= trainer.accumulate_grad_batches
        bpb = loss / math.log(2) / pl_module.data.tokens.bytes_per_token()
        speed = self.tokens_per_second()
        return f"loss {loss:.3f}  bpb {bpb:.3f}  {'-' if math.isnan(speed) else f'{speed:,.0f}'} tokens/s"

    def _seconds_left(self, step: int, total: int) -> str:
        if len(self._window) < 2:
            return "?"
        per_batch = (self._window[-1][0] - self._window[0][0]) / (len(self._window) - 1)
        seconds = round(per_batch * (total - step) * self.trainer.accumulate_grad_batches)
        return f"{seconds // 60}:{seconds % 60:02d}"
