"""Zeros and flips that a run logs, against the weights before and behind each step."""

from typing import Any, ClassVar

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitnet.layers import low_bit_layers


class Weights(Callback):
    """Levels of all matrices before and behind every step, in float64."""

    seen: ClassVar[list[list[np.ndarray[Any, Any]]]] = []

    def look(self, model: Any) -> None:
        levels = []
        for layer in low_bit_layers(model).values():
            w = layer.weight.detach().double().numpy()
            levels.append(np.clip(np.round(w / np.abs(w).mean()), -1, 1).ravel())
        Weights.seen.append(levels)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.look(pl_module.transformer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(pl_module.transformer)


def test_zeros_and_flips_are_those_of_the_logged_step(stories, tmp_path, run_fit) -> None:
    """The first step and every second one are logged: flips are those of that step alone."""
    Weights.seen.clear()
    options = ("--trainer.max_steps=6", "--trainer.log_every_n_steps=2", "--model.optim.lr=2e-2")
    run_fit(stories, tmp_path / "run", *options, "--trainer.callbacks+=tests.e2e.test_metrics.Weights")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    flips = {e.step: e.value for e in events.Scalars("quant/flip_rate")}
    zeros = {e.step: e.value for e in events.Scalars("quant/zero_fraction")}
    assert list(flips) == [1, 2, 4, 6] and len(Weights.seen) == 12
    before, behind = ([np.concatenate(levels) for levels in Weights.seen[start::2]] for start in (0, 1))
    changed = [(a != b).mean() for a, b in zip(before, behind, strict=True)]
    assert min(changed) > 0.001
    for step in flips:
        assert flips[step] == pytest.approx(changed[step - 1], abs=1e-6)
        assert zeros[step] == pytest.approx((behind[step - 1] == 0).mean(), abs=1e-6)
