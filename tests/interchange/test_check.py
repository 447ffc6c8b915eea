"""Comparisons and bounds, by hand."""

import math

import pytest
import torch

from bitnet.interchange.check import EXACT, Bound, bound_of_gguf, bound_of_hf, compare, own_texts

from .conftest import opened_model


def test_compare_by_hand() -> None:
    """Two tokens over two ids: one agrees, one is 3:1 against 1:1."""
    ours = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    theirs = torch.log(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    found = compare(ours, theirs, logits=False)
    assert found.difference == pytest.approx(math.log(2))
    kl = 0.5 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert found.kl == pytest.approx(kl)
    assert found.argmax == 0.5  # the first id wins a tie here, the second one there
    assert found.mean_difference == pytest.approx((math.log(2) + math.log(1.5)) / 4)


def test_logits_may_differ_by_a_constant_only_in_kl() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    found = compare(logits, logits + 1, logits=True)
    assert found.kl == pytest.approx(0, abs=1e-12) and found.difference == pytest.approx(1)


@pytest.mark.parametrize("bound", [EXACT, Bound(difference=1.0), Bound(kl=1.0), Bound(argmax=0.0, kl=1.0)])
def test_nan_misses_every_bound(bound) -> None:
    found = compare(torch.zeros(1, 2), torch.full((1, 2), math.nan), logits=True)
    assert found.failures(bound)


def test_bounds_are_the_documented_ones() -> None:
    assert str(bound_of_hf("bitlinear", "float32")) == "equality"
    assert str(bound_of_hf("autobitlinear", "float32")) == "KL < 0.0001, argmax >= 99%"
    assert str(bound_of_gguf("f32")) == "difference < 0.0001"
    assert str(bound_of_gguf("tq2_0")) == str(bound_of_gguf("tq1_0")) == "KL < 0.001, argmax >= 90%"


def test_texts_are_the_models_own_and_the_same_every_time() -> None:
    opened = opened_model(max_seq_len=16)
    texts = own_texts(opened, 40)
    assert [len(ids) for ids in texts] == [14, 13, 13]
    assert [len(ids) for ids in own_texts(opened, 31)] == [11, 10, 10]  # no rest of one
    assert [len(ids) for ids in own_texts(opened, 3)] == [8]
    assert all(ids[0] == opened.eos_id for ids in texts)
    assert own_texts(opened, 40) == texts and texts[0] != texts[1]
