"""What a ``Trainer`` is refused for before it runs, and what Lightning refuses while it does, as one line each."""

import traceback
from pathlib import Path
from typing import Any

import lightning

from bitnet.errors import UserError

LIGHTNING = Path(lightning.__file__).parent


def check_trainer(trainer: Any) -> None:
    """Refuse numbers that Lightning takes and fails on, or means otherwise than this library; and what follows."""
    for name, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        value = getattr(trainer, name)
        if value is not None and value < least:
            raise UserError(f"trainer.{name} = {value}: must be {least} or more.")
    if getattr(trainer, "val_check_interval", None) == 0:  # Lightning has none where the clock decides
        raise UserError("trainer.val_check_interval = 0: must be more; trainer.limit_val_batches = 0 never validates.")
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches = {trainer.overfit_batches}: would take other rows in each epoch; give a short "
            "text as data.path and as data.val_path."
        )
    _check_intervals(trainer)


def _check_intervals(trainer: Any) -> None:
    """Refuse a run without an end, which no schedule can follow, and validation inside a window of accumulation: a
    checkpoint that is saved there would count batches as done whose gradients are lost."""
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        raise UserError("trainer.max_steps = -1: the schedule must know where the run ends; give a number of steps.")
    window = trainer.accumulate_grad_batches
    every = getattr(trainer, "val_check_interval", "a duration")  # Lightning has none where the clock decides
    if window == 1 or (isinstance(every, float) and every == 1.0):  # whole epochs end with a step
        return
    if not isinstance(every, int):
        raise UserError(
            f"trainer.val_check_interval = {every}: with trainer.accumulate_grad_batches = {window} it must be a "
            f"number of batches, and a multiple of {window}."
        )
    never = 0 <= trainer.max_steps * window < every
    if not never and every % window:
        below = every - every % window
        raise UserError(
            f"trainer.val_check_interval = {every}: counts batches, and must be a multiple of "
            f"trainer.accumulate_grad_batches = {window}; try {below or window}."
        )


def of_lightning(error: Exception) -> UserError | None:
    """What Lightning's own code refuses once a run begins: options that cannot be met. None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(LIGHTNING):
        return None
    return UserError(f"trainer: {' '.join(str(error).split())}")
