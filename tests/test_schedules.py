"""Every schedule against values worked out by hand."""

import pytest
import torch
from torch import nn

from bitnet.config import OptimConfig, ScheduleConfig
from bitnet.training.optim import apply_schedule, build_optimizer, parameter_groups
from bitnet.training.schedules import lr_factor, weight_decay_factor


@pytest.mark.parametrize(
    "kind,expected",
    [
        # total 100, warm-up 20: q = (step - 20) / 80
        ("linear", {20: 1.0, 40: 0.75, 60: 0.5, 99: 0.0125, 100: 0.0}),
        # the peak falls to 2/3 at half of the run, where q = 30/80
        ("two_stage", {20: 1.0, 49: 1 - 29 / 80, 50: 2 / 3 * 50 / 80, 75: 2 / 3 * 25 / 80, 100: 0.0}),
        ("cosine", {20: 1.0, 40: 0.8535533905932737, 60: 0.5, 80: 0.14644660940672624, 100: 0.0}),
        ("wsd", {20: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 100: 0.0}),
        ("constant", {20: 1.0, 60: 1.0, 99: 1.0}),
    ],
)
def test_shapes(kind, expected) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=20)
    for step, factor in {0: 0.05, 9: 0.5, 19: 1.0, **expected}.items():
        assert lr_factor(schedule, step, 100) == pytest.approx(factor), (kind, step)


def test_microsofts_two_stage_example() -> None:
    """Peak 1.5e-3 and then 1e-3, no warm-up: 7.5e-4 just before the middle, 5e-4 just after (training.md, 3.3)."""
    schedule = ScheduleConfig(kind="two_stage", warmup_steps=0)
    assert 1.5e-3 * lr_factor(schedule, 49_999, 100_000) == pytest.approx(7.5e-4, rel=1e-4)
    assert 1.5e-3 * lr_factor(schedule, 50_000, 100_000) == pytest.approx(5e-4, rel=1e-4)


def test_minimum_and_a_warmup_longer_than_the_run() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, min_ratio=0.1)
    assert lr_factor(schedule, 100, 100) == 0.1
    assert lr_factor(schedule, 0, 100) == 0.1  # warm-up is not lifted to the minimum: 1/10
    assert lr_factor(ScheduleConfig(kind="linear", warmup_steps=200), 99, 100) == 0.5


@pytest.mark.parametrize("until,last", [(0.5, 49), (2 / 3, 66), (1.0, 99)])
def test_weight_decay_ends(until, last) -> None:
    schedule = ScheduleConfig(weight_decay_until=until)
    factors = [weight_decay_factor(schedule, step, 100) for step in range(100)]
    assert factors == [1.0] * (last + 1) + [0.0] * (99 - last)


def test_optimizer_groups_and_their_schedule(tiny_config) -> None:
    from bitnet.model import Transformer

    model = Transformer(tiny_config)
    groups = parameter_groups(model)
    assert len(groups["matrices"]) == 14 and len(groups["embeddings"]) == 1
    assert sum(len(g) for g in groups.values()) == len(list(model.parameters()))
    config = OptimConfig(lr=2e-3, weight_decay=0.1)
    schedule = ScheduleConfig(kind="linear", warmup_steps=0, weight_decay_until=0.5)
    optimizer = build_optimizer(model, config)
    apply_schedule(optimizer, config, schedule, 25, 100)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.5e-3] * 3)
    apply_schedule(optimizer, config, schedule, 50, 100)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0, 0.0]


def test_untied_head_is_an_embedding() -> None:
    model = nn.ModuleDict({"tok": nn.Embedding(5, 4), "w": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    groups = parameter_groups(model)
    assert [p.shape for p in groups["embeddings"]] == [torch.Size([5, 4]), torch.Size([5, 4])]
    assert [p.ndim for p in groups["norms"]] == [1]  # the bias
