"""SmoothQuant and AWQ: folding keeps the function, and quantizing after it costs less."""

import copy

import pytest
import torch

from bitnet.affine import Scheme, dequantize_affine, fit, quantize_affine
from bitnet.layers import quantized_layers
from bitnet.recipes import AWQ, RTN, SmoothQuant
from bitnet.recipes.calibration import Chain
from bitnet.recipes.smoothing import pairs
from bitnet.recipes.smoothquant import smoothing_factors
from tests.recipes.conftest import random_model, token_batches

KINDS = [{}, {"sub_norm": True, "activation": "relu2"}, {"n_kv_heads": 2}, {"tie_embeddings": True}]


@pytest.mark.parametrize("sizes", KINDS, ids=str)
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_keeps_the_function(sizes, alpha, matrices) -> None:
    model = random_model(**sizes).double()
    data = token_batches()
    before, weights = model(data[0]), copy.deepcopy(model.state_dict())
    recipe = SmoothQuant(alpha=alpha, matrices=matrices)
    recipe.smooth(model, data, alpha)
    w3 = model.layers[0].feed_forward.w3.weight
    changed = (w3 / weights["layers.0.feed_forward.w3.weight"]).std(0)  # a factor of its own for each row
    assert bool((changed > 1e-3).all()) == (matrices and not model.config.sub_norm)
    assert not torch.equal(weights["layers.0.attention_norm.weight"], model.layers[0].attention_norm.weight)
    torch.testing.assert_close(model(data[0]), before, atol=1e-10, rtol=0)
    recipe.smooth(model, data, alpha)
    torch.testing.assert_close(model(data[0]), before, atol=1e-10, rtol=0)


@torch.no_grad()
def test_every_reader_of_a_smoothed_norm_is_scaled() -> None:
    """One forgotten linear changes the function: the test above would see it."""
    model = random_model().double()
    data = token_batches()
    before = model(data[0])
    for pair in pairs(model.layers[0]):
        s = torch.rand(64, dtype=torch.float64) + 0.5
        pair.fold(s)
        torch.testing.assert_close(model(data[0]), before, atol=1e-10, rtol=0)
        name, linear = next(iter(pair.readers.items()))
        kept = linear.weight.detach().clone()
        linear.weight.div_(s)
        assert float((model(data[0]) - before).abs().max()) > 1e-3, name
        linear.weight.copy_(kept)


def test_readers_are_all_that_read() -> None:
    found = [list(pair.readers) for pair in pairs(random_model(sub_norm=True).layers[0])]
    assert found == [
        ["attention.wq", "attention.wk", "attention.wv"], ["feed_forward.w1", "feed_forward.w3"], ["attention.wo"],
        ["feed_forward.w2"],
    ]  # fmt: skip
    plain = [list(pair.readers) for pair in pairs(random_model().layers[0], matrices=True)]
    assert plain[2:] == [["attention.wo"], ["feed_forward.w2"]]
    grouped = [list(pair.readers) for pair in pairs(random_model(n_kv_heads=2).layers[0], matrices=True)]
    assert grouped[2:] == [["feed_forward.w2"]]


def test_the_best_alpha_is_strictly_inside() -> None:
    """One layer with outliers that nothing compensates; relative errors of a per-tensor W8A8 product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 128, generator=generator)
    x[:, :3] *= 80
    w = torch.randn(128, 128, generator=generator)
    scheme = Scheme(bits=8, granularity="tensor")

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return dequantize_affine(quantize_affine(t, *fit(t, scheme), scheme), *fit(t, scheme), scheme)

    errors = {}
    for alpha in (None, 0.0, 0.25, 0.5, 0.75, 1.0):
        s = torch.ones(128) if alpha is None else smoothing_factors(x.abs().amax(0), w.abs().amax(0), alpha)
        exact = x @ w.t()
        errors[alpha] = float((rounded(x / s) @ rounded(w * s).t() - exact).norm() / exact.norm())
    assert min(errors, key=errors.get) == 0.5
    assert errors[0.5] < 0.35 * errors[None] and errors[0.5] < 0.7 * min(errors[0.0], errors[1.0])


def test_smoothing_factors_by_hand() -> None:
    s = smoothing_factors(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0]), 0.5)
    assert s.tolist() == pytest.approx([2.0, max((1e-5 / 2) ** 0.5, 1e-5)])


@torch.no_grad()
def test_static_ranges_are_those_after_smoothing() -> None:
    model, data = random_model(), token_batches()
    smooth = copy.deepcopy(model)
    SmoothQuant(alpha=0.5).smooth(smooth, data, 0.5)
    SmoothQuant(level="o3").prepare(model, data)
    seen: list[torch.Tensor] = []
    linear = smooth.layers[1].feed_forward.w1
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in data:
        smooth(batch)
    handle.remove()
    limits = model.layers[1].feed_forward.w1.act.limits
    everything = torch.cat(seen)
    # The calibration runs with rounded weights in front, so the ranges are near, not equal.
    assert limits.tolist() == pytest.approx([float(everything.min()), float(everything.max())], rel=0.05)


def test_searched_alpha_is_the_one_that_predicts_best() -> None:
    model, data = random_model(), token_batches()
    recipe = SmoothQuant(alpha="auto")
    recipe.prepare(model, data)
    losses = recipe.found["losses"]
    assert recipe.found["alpha"] == min(losses, key=losses.get) and len(set(losses.values())) > 1


@pytest.mark.parametrize("sizes", KINDS, ids=str)
def test_awq_keeps_the_function_and_lowers_the_error(sizes) -> None:
    model, data = random_model(**sizes), token_batches()
    with torch.no_grad():  # channels that matter more than others
        for block in model.layers:
            block.attention_norm.weight[:4] *= 20
            block.ffn_norm.weight[:4] *= 20
    exact = model(data[0]).detach()
    folded = copy.deepcopy(model).double()
    chain = Chain(folded, data)
    hidden = chain.embedded()
    for block in chain.blocks:
        AWQ(group_size=32).scale_block(chain, block, hidden)
        hidden = chain.run(block, hidden)
    assert not torch.equal(folded.layers[0].ffn_norm.weight.float(), model.layers[0].ffn_norm.weight)
    torch.testing.assert_close(folded(data[0]), copy.deepcopy(model).double()(data[0]), atol=1e-10, rtol=0)

    errors = []
    for recipe in (RTN(bits=5, group_size=32), AWQ(bits=5, group_size=32)):
        copied = copy.deepcopy(model)
        assert len(recipe.prepare(copied, data)) == 14 == len(quantized_layers(copied))
        errors.append(float((copied(data[0]) - exact).norm() / exact.norm()))
    assert errors[1] < 0.9 * errors[0]
