"""SIGTERM and Ctrl-C: the run saves behind the step it is in, says how to go on, and ends with the code of the signal.

Before training begins there is nothing to save, and the command ends at once. A second Ctrl-C always does.

A save must not fall inside a window of gradient accumulation, so the window is finished first; when that takes longer
than ``PATIENCE``, the run ends with the checkpoint that it has. Several processes stop behind the same step: each tells
the others with the figures that ``Watch`` gathers anyway, and all of them save.
"""

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from bitnet.training.atomic import LAST
from bitnet.training.lit import LitBitNet
from bitnet.training.report import command_prefix

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
PATIENCE = 3.0
"""Seconds that may pass until the end of a window of accumulation. Clusters kill 5 to 30 seconds after SIGTERM."""


class Interrupted(BaseException):
    """A signal ends the command; the text says what is left. No ``Exception``, so that nothing mistakes it for one."""

    def __init__(self, received: int, text: str) -> None:
        super().__init__(f"stopped by {SIGNALS[signal.Signals(received)]}: {text}")
        self.exit_code = 128 + received


def _handle(handler: Any) -> dict[signal.Signals, Any]:
    """Let ``handler`` take the signals; return who had them. Only the main thread may ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within this block a signal raises ``Interrupted`` at once, unless a run that trains sees to it."""

    def end(received: int, frame: FrameType | None) -> None:
        raise Interrupted(received, "no step had been made.")

    before = _handle(end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption(Checkpoint):
    """Ends the run behind the step in which a signal comes. A ``Checkpoint``, since these are called last."""

    def __init__(self) -> None:
        self.received = 0
        """The signal that this process was sent, or 0."""
        self.agreed = 0
        """The signal that one of several processes was sent, which all of them know at the same step."""
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _handle(self._note)

    def _note(self, received: int, frame: FrameType | None) -> None:
        self.received, self._since = received, time.monotonic()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one does not wait for Python

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitBitNet, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        alone = trainer.world_size == 1
        received = self.received if alone else self.agreed
        if received and (pl_module.steps_now or (alone and time.monotonic() - self._since > PATIENCE)):
            self._end(trainer, received, save=pl_module.steps_now)

    def on_validation_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: LitBitNet, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.received and trainer.world_size == 1 and not trainer.sanity_checking:
            self._end(trainer, self.received, save=pl_module.steps_now)

    def _end(self, trainer: L.Trainer, received: int, save: bool) -> None:
        from bitnet.training.callbacks import LastCheckpoint

        if save:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    callback.save(trainer)
        folder = Path(trainer.default_root_dir)
        if not (folder / "checkpoints" / LAST).exists():
            raise Interrupted(received, "nothing had been saved.")
        left = f"step {trainer.global_step} is saved" if save else "the checkpoint is of an earlier step"
        config = shlex.quote(str(folder / "config.yaml"))
        raise Interrupted(received, f"{left}; go on with '{command_prefix()} fit --config {config} --ckpt_path last'.")
