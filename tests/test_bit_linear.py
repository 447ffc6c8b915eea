"""BitLinear: the forward is integer arithmetic, bit for bit; the backward is the straight-through estimator."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

from bitnet.layers import BitLinear, integer_products, swap_linears
from bitnet.layers.integer_products import MAX_EXACT_K, Arithmetic
from bitnet.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, WeightQuantizer
from bitnet_kernels import matmul_reference

KINDS = ["ternary", "binary"]


def make(kind: str, bits: int = 8, n: int = 48, k: int = 96, bias: bool = False, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    return BitLinear(k, n, bias=bias, weight_kind=kind, act_bits=bits)


def int32_reference(layer: BitLinear, x: torch.Tensor) -> torch.Tensor:
    """The forward in int8 and int32, with one float32 division at the end."""
    x_q, x_inv = ACTIVATION_QUANTIZERS[layer.act_bits](x)
    w_q, w_inv = WEIGHT_QUANTIZERS[layer.weight_kind](layer.weight)
    total = matmul_reference(x_q.to(torch.int8).flatten(0, -2), w_q.to(torch.int8))
    return (total.float().view(*x.shape[:-1], -1) / (x_inv * w_inv)).to(x.dtype)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_int32_reference(kind, bits, dtype, shape) -> None:
    layer = make(kind, bits)
    x = torch.randn(*shape, 96).to(dtype)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(x), int32_reference(layer, x))


@pytest.mark.parametrize("n,k", [(1, 1), (7, 13), (33, 257), (5, 4097), (2, MAX_EXACT_K)])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_exact_at_odd_sizes(kind, n, k) -> None:
    layer = make(kind, n=n, k=k).eval()
    x = torch.randn(3, k)
    x[0] = 1.0  # every activation at 127: the largest sums
    assert torch.equal(layer(x), int32_reference(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_does_not_depend_on_threads_or_matmul_precision(kind) -> None:
    layer, x = make(kind, n=256, k=512).eval(), torch.randn(64, 512)
    expected = layer(x)
    for precision in ("highest", "high", "medium"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(layer(x), expected)
            assert torch.get_float32_matmul_precision() == precision
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


def test_forward_is_exact_under_autocast() -> None:
    layer, x = make("ternary").eval(), torch.randn(8, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, int32_reference(layer, x).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_equal_rows_alone(kind) -> None:
    layer, x = make(kind).eval(), torch.randn(8, 96)
    batch = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], batch[i]) for i in range(8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_float64_at_the_quantized_point(kind, bits) -> None:
    layer = make(kind, bits, bias=True)
    x = torch.randn(5, 7, 96, requires_grad=True)
    grad = torch.randn(5, 7, 48)
    layer(x).backward(grad)
    x_q, x_inv = ACTIVATION_QUANTIZERS[bits](x)
    w_q, w_inv = WEIGHT_QUANTIZERS[kind](layer.weight)
    g = grad.double()
    grad_x = g @ (w_q.double() / w_inv.double())
    grad_w = g.flatten(0, 1).T @ (x_q.double() / x_inv.double()).flatten(0, 1)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), grad_w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), g.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_nan_reaches_the_output_and_only_its_own_row() -> None:
    layer, x = make("ternary").eval(), torch.randn(3, 96)
    clean = layer(x)
    x[1, 5] = float("nan")
    y = layer(x)
    assert torch.isnan(y[1]).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    assert torch.isnan(layer(clean.new_ones(1, 96))).all()


def test_saved_activations_are_int8() -> None:
    layer, x = make("ternary", k=256), torch.randn(32, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    big = [t for t in saved if t.numel() == x.numel()]
    assert [t.dtype for t in big] == [torch.int8]


def test_layers_that_read_the_same_tensor_quantize_it_once(monkeypatch) -> None:
    calls = []
    kernel = integer_products.rms_norm_quantize
    monkeypatch.setattr(integer_products, "rms_norm_quantize", lambda *a: calls.append(1) or kernel(*a))
    layers = [make("ternary", seed=i) for i in range(3)]
    four_bits = make("ternary", 4)
    x = torch.randn(2, 5, 96, requires_grad=True) * 1.0  # an intermediate result, as the output of a norm is
    outputs = [layer(x) for layer in layers]
    assert len(calls) == 1
    four_bits(x)
    assert torch.equal(layers[0](x), outputs[0])  # four bits had taken the place
    assert len(calls) == 2
    with torch.no_grad():
        x.mul_(2.0)  # written to in place: what was kept is no longer right
    changed = layers[0](x)
    assert len(calls) == 3
    monkeypatch.undo()
    assert torch.equal(changed, int32_reference(layers[0], x))
    assert all(torch.equal(y, int32_reference(layer, x / 2)) for y, layer in zip(outputs, layers, strict=True))
    leaf = torch.randn(2, 96)
    layers[0](leaf)
    assert vars(leaf) == {}


def test_float_layer_and_one_sided_quantization() -> None:
    x = torch.randn(4, 96)
    torch.testing.assert_close(make("none", "none")(x), F.linear(x, make("none", "none").weight))
    layer = make("ternary", "none")  # W1.58A16
    q, inv = WEIGHT_QUANTIZERS["ternary"](layer.weight)
    torch.testing.assert_close(layer(x), x @ (q / inv).T)
    layer = make("none", 8)
    q, inv = ACTIVATION_QUANTIZERS[8](x)
    torch.testing.assert_close(layer(x), (q / inv) @ layer.weight.T)


def test_warmup_goes_from_float_to_exact_and_never_touches_eval() -> None:
    layer, x = make("ternary"), torch.randn(6, 96)
    served = copy.deepcopy(layer).eval()(x)
    layer.warmup = 0.0
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    with torch.inference_mode():  # also where a number would not be good for backward
        layer.warmup = 0.5
    w_q, w_inv = WEIGHT_QUANTIZERS["ternary"](layer.weight)
    x_q, x_inv = ACTIVATION_QUANTIZERS[8](x)
    halfway = F.linear((x + x_q / x_inv) / 2, (layer.weight + w_q / w_inv) / 2)
    torch.testing.assert_close(layer(x), halfway)
    assert torch.equal(layer.eval()(x), served)
    layer.train().warmup = 1.0
    assert torch.equal(layer(x), served)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_gradients_while_blending_are_those_of_float64_and_keep_nothing_new(warmup) -> None:
    """What autograd keeps are the inputs and the weight themselves, or memory would run out in the middle of a run."""
    layer, x, g = make("ternary"), torch.randn(6, 96, requires_grad=True), torch.randn(6, 48)
    layer.act_bits, layer.warmup = ("none", 1.0) if warmup == 1.0 else (8, warmup)  # one-sided at full strength
    there, kept = {t.untyped_storage().data_ptr() for t in (x, layer.weight)}, set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > 0:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    layer.warmup = 0.7  # backward belongs to the forward that was
    y.backward(g)
    assert kept <= there
    w, w_inv = layer.weight.detach(), layer.quantized_weight()[1].double()
    q = (w.double() * w_inv).round().clamp(-1, 1) / w_inv
    a = x.detach().double()
    a_inv = 127 / a.abs().amax(-1, keepdim=True)
    rounded = (a * a_inv).round() / a_inv if layer.act_bits == 8 else a
    blended_w, blended_a = (u + warmup * (v - u) for u, v in ((w.double(), q), (a, rounded)))
    torch.testing.assert_close(y.double(), blended_a @ blended_w.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), g.double() @ blended_w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), g.double().T @ blended_a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_a_float_start_keeps_no_bf16_copies_of_weights(warmup) -> None:
    layer, x, kept = make("ternary"), torch.randn(6, 96, requires_grad=True), []
    layer.warmup = warmup
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t),
    ):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.bfloat16 not in kept
    y.float().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_blending_is_compiled_once(monkeypatch) -> None:
    """A number that changes with each step would be compiled anew each time, until the compiler gives up for good."""
    counter, x = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), torch.randn(4, 96)
    block = nn.Sequential(make("ternary"), make("binary", k=48))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    compiled, compilations = torch.compile(block, backend=counter), []
    for warmup in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        for layer in block:
            layer.warmup = warmup
        assert torch.equal(compiled(x), block(x))
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] < compilations[1] <= compilations[2] == compilations[-1]


@pytest.mark.parametrize("fused", [True, False])
def test_quantized_weight_is_never_stale(fused) -> None:
    """Fused optimizers do not raise a parameter's version counter: a cache keyed on it trains frozen trits."""
    layer = make("ternary")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    x = torch.randn(16, 96)
    for mode in (True, False, True, False):
        layer.train(mode)
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = WEIGHT_QUANTIZERS["ternary"](layer.weight)
        assert torch.equal(layer.quantized_weight()[0].float(), fresh[0])
        with torch.no_grad():
            assert torch.equal(layer(x), int32_reference(layer, x))
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer.load_state_dict({"weight": torch.randn(48, 96)})
        assert torch.equal(layer(x), int32_reference(layer, x))


def test_quantized_weight_is_computed_once_while_held(monkeypatch) -> None:
    calls = []
    levels = WeightQuantizer.int8_levels
    monkeypatch.setattr(WeightQuantizer, "int8_levels", lambda *a: calls.append(1) or levels(*a))
    layer, x = make("ternary"), torch.randn(4, 96)
    layer.hold(True)
    for _ in range(3):
        layer(x).sum().backward()
    assert len(calls) == 1
    layer.hold(False)
    layer(x)
    layer(x)
    assert len(calls) == 3
    layer.eval()
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
    assert len(calls) == 4


def test_levels_of_a_validation_inside_a_window_are_not_trained_with() -> None:
    """They are made in inference mode, and Lightning puts ``training`` back without calling ``train()``."""
    layer, x = make("ternary"), torch.randn(4, 96)
    layer.hold(True)
    layer(x).sum().backward()
    layer.eval()
    with torch.inference_mode():
        layer(x)
    layer.training = True
    layer.hold(True)
    assert layer.holds_nothing
    layer(x).sum().backward()


def test_levels_are_packed_where_the_packed_product_reads_them() -> None:
    """Held over a window of accumulation they would take a quarter of a byte per weight for nothing."""
    float_units, float_inputs = make("ternary"), make("ternary")
    float_units.arithmetic, float_inputs.act_bits = Arithmetic(forward="float"), "none"
    assert [layer.levels().packed is None for layer in (float_units, float_inputs)] == [True, True]
    layer, x = make("ternary"), torch.randn(4, 96)
    for layer.warmup in (0.5, 1.0):
        layer.hold(True)
        layer(x).sum().backward()
        assert (layer.levels().packed is None) == (layer.warmup < 1.0)
        layer.hold(False)
    layer.warmup = 0.5
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), int32_reference(layer, x))
    assert layer.levels().packed is not None


def test_swap_shares_parameters_skips_the_head_and_takes_any_module() -> None:
    tower = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.ModuleDict({"tower": tower, "lm_head": nn.Linear(8, 4), "again": tower[0]})
    weight, keys = tower[0].weight, list(model.state_dict())
    changed = swap_linears(model, lambda name, linear: BitLinear.from_linear(linear, "ternary", 8))
    assert changed == ["tower.0", "tower.2", "again"]
    assert model["again"] is model["tower"][0] and model["again"].weight is weight
    assert type(model["lm_head"]) is nn.Linear
    assert list(model.state_dict()) == keys
    assert swap_linears(model, lambda name, linear: None) == []
