"""Scale rules against their definitions in numpy, known optima, and float64 gradients."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitnet import BitNet, Transformer
from bitnet.checkpoint import load_checkpoint, read_checkpoint
from bitnet.errors import UserError
from bitnet.inference.packing import pack
from bitnet.layers import BitLinear, ScaledBitLinear, low_bit_layers
from bitnet.quantizers import EPS, WEIGHT_QUANTIZERS
from bitnet.scale_rules import GAUSSIAN, ScaledQuantizer
from bitnet.training.cli import main as fit

from .conftest import tiny_options
from .runs import run_digest

RULES = [
    ("ternary", "absmean"), ("ternary", "absmedian"), ("ternary", "rms"), ("ternary", "twn"),
    ("binary", "absmean"), ("binary", "absmedian"), ("binary", "rms"),
]  # fmt: skip
PER = ["matrix", "row", 64, 128]


def weights(n: int = 6, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def layer_of(linear: nn.Linear, learned: bool = False, mask: float | None = None, **options: Any) -> ScaledBitLinear:
    quantizer = ScaledQuantizer(**options)
    return ScaledBitLinear.from_float(linear, 8, quantizer=quantizer, learned=learned, gradient_clip=mask)


def by_numpy(w: np.ndarray, kind: str, rule: str) -> tuple[np.ndarray, float]:
    """Levels and scale of one group, from the papers' formulas in float64."""
    size = np.abs(w)
    step = {
        "absmean": size.mean(),
        "absmedian": np.sort(size, axis=None)[(size.size - 1) // 2],  # the lower of two
        "rms": GAUSSIAN[kind] * math.sqrt((w**2).mean()),
        "twn": 1.5 * size.mean(),
    }[rule]
    if kind == "binary":
        return np.where(w > w.mean(), 1, -1), step
    q = np.clip(np.rint(w / step), -1, 1)
    return q, size[q != 0].mean() if rule == "twn" else step


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind,rule", RULES)
def test_levels_and_scales(kind, rule, per) -> None:
    w = weights()
    q, scale, step = ScaledQuantizer(kind=kind, rule=rule, per=per)(w)
    assert q.dtype == torch.int8 and scale.dtype == step.dtype == torch.float32
    width = {"matrix": 6 * 256, "row": 256}.get(per, per)
    parts, levels = w.double().numpy().reshape(-1, width), q.numpy().reshape(-1, width)
    assert scale.numel() == len(parts)
    for part, found, number in zip(parts, levels, scale.flatten().tolist(), strict=True):
        expected, expected_scale = by_numpy(part, kind, rule)
        assert np.array_equal(found, expected)
        assert number == pytest.approx(expected_scale, rel=3e-7)


def test_one_absmean_for_the_matrix_is_the_plain_quantizer() -> None:
    for kind, plain in WEIGHT_QUANTIZERS.items():
        q, scale, _ = ScaledQuantizer(kind=kind)(weights(seed=3))
        expected, inv_scale = plain(weights(seed=3))
        assert torch.equal(q.float(), expected) and torch.equal(scale.reciprocal().view(()), inv_scale)


def test_the_optima_of_gaussian_weights() -> None:
    """Squared errors known from quantizer design: 0.1902 for three levels, 1 - 2 / pi for two (Max, 1960)."""
    w = weights(400, 1000, seed=1) / 0.02
    errors = {}
    for kind, rule in RULES:
        q, scale, _ = ScaledQuantizer(kind=kind, rule=rule)(w)
        errors[kind, rule] = float((w - q * scale).square().mean())
    assert errors["ternary", "rms"] == pytest.approx(0.1902, abs=2e-3)
    assert errors["ternary", "twn"] == pytest.approx(0.1902, abs=2e-3)
    assert errors["ternary", "absmean"] > 0.25
    assert errors["binary", "rms"] == pytest.approx(1 - 2 / math.pi, abs=2e-3)
    assert errors["binary", "absmean"] == pytest.approx(1 - 2 / math.pi, abs=2e-3)


def test_twn_has_the_least_error_of_its_levels() -> None:
    w = weights(seed=2)
    q, scale, _ = ScaledQuantizer(kind="ternary", rule="twn", per="row")(w)
    best = (w.double() * q).sum(1) / q.double().square().sum(1)  # the projection
    torch.testing.assert_close(scale[:, 0].double(), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind,rule", RULES)
def test_zeros_and_what_is_not_finite(kind, rule) -> None:
    quantizer = ScaledQuantizer(kind=kind, rule=rule, per="row")
    w = weights()
    w[1], w[2, 5], w[3, 7] = 0.0, math.nan, math.inf
    _, scale, _ = quantizer(w)
    assert scale[1].item() == pytest.approx(EPS, rel=1e-6)
    assert scale[2].isnan() and scale[3].isnan()
    assert scale[[0, 4, 5]].isfinite().all()


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind,rule", RULES)
def test_forward_and_gradients_against_float64(kind, rule, per) -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(256, 48, bias=False), learned=True, kind=kind, rule=rule, per=per)
    with torch.no_grad():
        layer.factor.add_(torch.rand_like(layer.factor) * 0.2)
    x = torch.randn(9, 256).requires_grad_()
    y = layer(x)
    q, scale, _ = layer.quantizer(layer.weight)
    x_scale = 127 / x.detach().double().abs().amax(1, keepdim=True)
    seen = ((x.detach().double() * x_scale).round() / x_scale).requires_grad_()
    factor = layer.factor.detach().double().requires_grad_()
    groups = layer.quantizer.groups(q.double()) * (factor * scale.double())[..., None]
    dense = groups.view(q.shape)
    dense.retain_grad()
    exact = seen @ dense.T
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    direction = torch.randn(9, 48)
    y.backward(direction)
    exact.backward(direction.double())
    for found, expected in ((x.grad, seen.grad), (layer.weight.grad, dense.grad), (layer.factor.grad, factor.grad)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_far_weights_get_no_gradient() -> None:
    layer = layer_of(nn.Linear(256, 8, bias=False), mask=1.5, kind="ternary", rule="rms", per="row")
    nn.init.normal_(layer.weight)
    layer(torch.randn(5, 256)).sum().backward()
    _, _, step = layer.quantizer(layer.weight)
    far = layer.weight.abs() > 1.5 * step
    assert 0 < int(far.sum()) < far.numel()
    assert torch.equal(layer.weight.grad == 0, far)


def test_a_changed_factor_is_seen_at_once() -> None:
    layer = layer_of(nn.Linear(64, 8, bias=False), learned=True, kind="ternary", per="row").eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        before = layer(x)
        layer.factor.mul_(2.0)
        torch.testing.assert_close(layer(x), 2 * before)


def test_a_float_start(tiny_config) -> None:
    recipe = BitNet(quantize_from=0.25, quantizer_warmup=10)
    model = Transformer(tiny_config)
    recipe.prepare(model)
    model.train()
    seen = []
    for step in (0, 24, 25, 30, 35, 99):
        recipe.on_step(model, step, 100)
        seen.append({layer.warmup for layer in low_bit_layers(model).values()})
    assert seen == [{0.0}, {0.0}, {0.0}, {0.5}, {1.0}, {1.0}]
    assert recipe.served(99, 100) == BitNet()


def test_only_what_differs_from_the_papers_takes_the_slower_layer(tiny_config) -> None:
    for options, kind in (
        ({}, BitLinear),
        ({"scale": "rms"}, ScaledBitLinear),
        ({"mask_beyond": 2.0}, ScaledBitLinear),
    ):
        model = Transformer(tiny_config)
        BitNet(**options).prepare(model)
        assert {type(layer) for layer in low_bit_layers(model).values()} == {kind}


@pytest.mark.parametrize(
    "options,said",
    [
        ({"scale_per": 96}, "scale_per = 96"),
        ({"scale_per": 0}, "scale_per = 0"),
        ({"weight": "binary", "scale": "twn"}, "scale = twn"),
        ({"weight": "none", "scale_per": "row"}, "need ternary or binary"),
        ({"mask_beyond": 0.3}, "mask_beyond = 0.3"),
        ({"quantize_from": 1.0}, "quantize_from = 1.0"),
    ],
)
def test_refusals(options, said) -> None:
    with pytest.raises(UserError, match=said):
        BitNet(**options)


def test_a_width_that_no_group_fits_is_refused(tiny_config) -> None:
    with pytest.raises(UserError, match="a matrix has 32 inputs"):
        BitNet(scale_per=64).prepare(Transformer(replace(tiny_config)))


def test_integer_gradients_need_the_plain_scale(stories, tmp_path, capsys) -> None:
    options = ["--model.recipe.scale=rms", "--model.arithmetic.input_gradient=int8"]
    assert fit([*tiny_options(stories, tmp_path / "run"), *options]) == 2
    assert "need float gradients" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_run_with_trained_factors_goes_on_and_is_packed(stories, tmp_path, run_fit) -> None:
    """The factors move, are in the checkpoint, and come back in a resumed run and in a loaded model."""
    options = ("--model.config.dim=64", "--model.recipe.scale_per=64", "--model.recipe.learned_scale=true")
    run_fit(stories, tmp_path / "whole", "--trainer.max_steps=12", *options)
    stop = ("--trainer.callbacks+=tests.training.stopping.TimeIsUp", "--trainer.callbacks.batch=5")
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=12", *options, *stop)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 6
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=12", *options, "--ckpt_path=last")
    model, _ = load_checkpoint(tmp_path / "whole")
    factors = torch.cat([layer.factor.flatten() for layer in low_bit_layers(model).values()])
    assert len(factors) > 100 and 0 < float((factors.detach() - 1).abs().mean()) < 0.5
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        assert torch.equal(model(tokens), pack(model)(tokens))
    assert run_digest(tmp_path / "run") == run_digest(tmp_path / "whole")
