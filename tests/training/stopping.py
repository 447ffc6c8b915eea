"""Callbacks for runs in processes of their own: end the run behind a step, as a power cut there would."""

import os

from lightning.pytorch.callbacks import Callback


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step >= self.step:
            trainer.strategy.barrier()
            os._exit(7)


class StopBeforeValidation(Callback):
    def on_validation_start(self, trainer, pl_module) -> None:
        os._exit(7)


class TimeIsUp(Callback):
    """Asks for the end behind a batch, once: whether or not a step ends there."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx == self.batch
