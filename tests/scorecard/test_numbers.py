"""N: numbers are right at the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitnet.interchange.gguf_blocks import i2_s, q2_0
from bitnet.interchange.hf_export import TRITS, pack_rows, unpack_rows
from bitnet.layers import BitLinear
from bitnet.layers.integer_products import MAX_EXACT_K
from bitnet.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, quantize_int4_absmean, quantize_int8_absmax
from bitnet.scale_rules import ScaledQuantizer
from bitnet_kernels import FORMATS, MAX_K, matmul_reference, packed_matmul
from bitnet_kernels.affine import pack_codes, unpack_codes
from bitnet_kernels.cpu import native
from tests.kernels.conftest import LEVELS, random_int8, random_levels

RESIDENT = ["ternary2", "binary1"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (0.0, 1e-45, 1e-40, 1e-38, 1e-8, 1e-6, 1e-5, 1e-3, 1.0, 1e2, 1e4)


def layer_of(kind: str, bits: int | str = 8, n: int = 48, k: int = 96, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    return BitLinear(k, n, bias=False, weight_kind=kind, act_bits=bits)


@pytest.mark.check("N1", "rows of zeros, of denormals and of 1e-8 to 1e4 are finite forward and backward", 132)
def test_edges_of_the_range(tally) -> None:
    for kind in ("ternary", "binary"):
        for bits in (8, 4):
            for dtype in DTYPES:
                for magnitude in MAGNITUDES:
                    layer = layer_of(kind, bits).to(dtype)
                    if not magnitude:
                        torch.nn.init.zeros_(layer.weight)
                    generator = torch.Generator().manual_seed(1)
                    x = torch.randn(3, 96, generator=generator).clamp(-1, 1) * magnitude
                    x = x.to(dtype)
                    x[0] = 0.0
                    x.requires_grad_()
                    y = layer(x)
                    y.float().sum().backward()
                    parts = (*ACTIVATION_QUANTIZERS[bits](x), *WEIGHT_QUANTIZERS[kind](layer.weight))
                    finite = all(bool(t.isfinite().all()) for t in (y, x.grad, layer.weight.grad, *parts))
                    zero = not y[0].any() and not parts[0][0].any()
                    tally(finite and zero, f"{kind} {bits} bits {dtype} {magnitude}: finite {finite}, zero {zero}")


@pytest.mark.check("N2", "NaN and infinity never become finite results", 100)
def test_not_finite(tally) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        x = torch.randn(4, 64, generator=generator)
        row, column = (int(torch.randint(n, (1,), generator=generator)) for n in x.shape)
        x[row, column] = (float("nan"), float("inf"), -float("inf"))[trial % 3]
        found = []
        for quantize in (quantize_int8_absmax, quantize_int4_absmean):
            q, inv_scale = quantize(x)
            found.append(bool((q / inv_scale)[row].isnan().any()))
        for kind in ("ternary", "binary"):
            q, scale, _ = ScaledQuantizer(kind=kind, per="row")(x)
            found.append(bool((q * scale)[row].isnan().all()))
            found.append(not bool(layer_of(kind, k=64)(x)[row].isfinite().any()))
        tally(all(found), f"{trial}: {found}")


def unpacked_by_hand(packed: Tensor, bits: int, n: int, k: int) -> np.ndarray:
    """Codes of planes in blocks of 256, weight by weight: as the drawing in kernels/README.md has them."""
    plane = 256 // (8 // bits)
    row_bytes = -(-k // 256) * 256 * bits // 8
    stored = packed.numpy().reshape(n, row_bytes)
    at = np.arange(k)
    byte = at // 256 * plane + at % 256 % plane
    return stored[:, byte] >> (at % 256 // plane * bits) & ((1 << bits) - 1)


def packs(kind: str, n: int, k: int, seed: int) -> bool:
    """Whether a random matrix comes back from a format, unchanged itself, and one bad value is refused."""
    if kind.startswith("codes"):
        bits = int(kind[5:])
        codes = torch.randint(1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        before, packed = codes.clone(), pack_codes(codes, bits)
        held = torch.equal(unpack_codes(packed, bits, k), codes) and torch.equal(codes, before)
        return held and (bits not in (2, 4, 8) or np.array_equal(unpacked_by_hand(packed, bits, n, k), codes.numpy()))
    if kind in ("hf", "q2_0", "i2_s"):
        n, k = {"hf": (n * TRITS, k), "q2_0": (n, 64 * (1 + k % 4)), "i2_s": (n, 128 * (1 + k % 2))}[kind]
        w = random_levels("ternary2", n, k, seed)
        before = w.clone()
        if kind == "hf":
            return torch.equal(unpack_rows(pack_rows(w)), w) and torch.equal(w, before)
        data = (q2_0 if kind == "q2_0" else i2_s)(w.numpy(), 0.5)
        if kind == "q2_0":
            stored = data.reshape(n, k // 64, 18)[:, :, 2:]
            codes = stored[..., None] >> np.array([0, 2, 4, 6]) & 3
        else:
            codes = data[:-32].reshape(-1, 32)[:, None] >> np.array([6, 4, 2, 0])[:, None] & 3
        return np.array_equal(codes.reshape(n, k).astype(np.int8) - 1, before.numpy()) and torch.equal(w, before)
    w = random_levels(kind, n, k, seed)
    before = w.clone()
    packed = FORMATS[kind].pack(w)
    if packed.shape != (n, FORMATS[kind].row_bytes(k)) or not torch.equal(FORMATS[kind].unpack(packed, n, k), w):
        return False
    if not torch.equal(w, before):
        return False
    if kind in RESIDENT:
        bits = 8 // FORMATS[kind].planes
        codes = unpacked_by_hand(packed, bits, n, k).astype(np.int8)
        if not np.array_equal(codes - 1 if bits == 2 else codes * 2 - 1, w.numpy()):
            return False
    w[seed % n, seed % k] = (2, -2, 127, -128)[seed % 4]
    try:
        FORMATS[kind].pack(w)
    except ValueError:
        return True
    return False


PACKINGS = [*sorted(FORMATS), *(f"codes{bits}" for bits in range(2, 9)), "hf", "q2_0", "i2_s"]


@pytest.mark.check("N3", "packing of every format gives back what it was given, which stays as it was", 5000)
def test_packing(tally) -> None:
    choose = np.random.default_rng(0)
    for trial in range(5000):
        kind = PACKINGS[trial % len(PACKINGS)]
        n, k, seed = int(choose.integers(1, 10)), int(choose.integers(1, 301)), int(choose.integers(2**31))
        tally(packs(kind, n, k, seed), f"{kind} {n} x {k}, seed {seed}")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in memory that is not that of a fresh matrix."""
    m, k = x.shape
    if layout == "sliced":
        base = torch.full((m * 2 + 1, k + 7), 111, dtype=torch.int8)
        base[1::2, 3 : 3 + k][:m] = x
        return base[1::2, 3 : 3 + k][:m]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "misaligned":
        return torch.cat([torch.zeros(1, dtype=torch.int8), x.flatten()])[1:].view(m, k)
    if layout == "expanded":
        return x[:1].expand(m, k) if m else x
    return x


def int64(x: Tensor, w: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T


LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned", "expanded")


@pytest.mark.check("N4", "packed products of odd shapes and layouts equal numpy's int64", 1006)
def test_products(tally) -> None:
    choose = np.random.default_rng(0)
    isas = [
        isa for isa in native.Isa if isa <= native.best_isa() and (isa == native.best_isa() or isa != native.Isa.NEON)
    ]
    shapes = [tuple(int(choose.integers(*ends)) for ends in ((0, 10), (1, 10), (1, 301))) for _ in range(1000)]
    large = [(m, n, k) for k in (4095, 4097, 6912) for m, n in ((1, 300), (5, 33))]
    for trial, (m, n, k) in enumerate([*shapes, *large]):
        format, layout = RESIDENT[trial % 2], LAYOUTS[trial % len(LAYOUTS)]
        x, w = laid_out(random_int8(m, k, trial), layout), random_levels(format, n, k, trial + 1)
        packed, before = FORMATS[format].pack(w), x.clone()
        y = packed_matmul(x, packed, format, n=n, k=k)
        held = np.array_equal(y.numpy(), int64(x, w)) and torch.equal(x, before)
        isa = isas[trial % len(isas)]
        z = native.packed_matmul(x.contiguous(), packed, FORMATS[format].planes, k, None, None, isa=isa)
        held = held and np.array_equal(z.numpy(), int64(x, w))
        tally(held, f"{m} x {n} x {k} {format} {layout} {isa.name}")


@pytest.mark.check("N5", "the largest sums are exact, and more inputs than a sum can hold are refused", 42)
def test_largest_sums(tally) -> None:
    for format in RESIDENT:
        for value in (-128, 127):
            for k in (255, 256, 257, 258, 259, 131_072, 132_104, 132_105, 200_000):
                x, w = torch.full((2, k), value, dtype=torch.int8), torch.ones(3, k, dtype=torch.int8)
                w[1] = -1
                y = packed_matmul(x, FORMATS[format].pack(w), format, n=3, k=k)
                held = y.dtype == torch.int32 and y.tolist() == [[value * k, -value * k, value * k]] * 2
                tally(held, f"{format} {value} {k}")
    layer = layer_of("binary", n=1, k=MAX_EXACT_K).eval()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[0, 0] = -1.0
        total = layer(torch.ones(1, MAX_EXACT_K)).double() * 127.0 * layer.quantized_weight()[1].double()
    tally(round(total.item()) == 127 * (MAX_EXACT_K - 2), "the layer at its limit")
    tally(127 * MAX_EXACT_K <= 2**24 < 127 * (MAX_EXACT_K + 1), "the limit of the layer is where float32 ends")
    tally(2 * 128 * MAX_K < 2**31 <= 2 * 128 * (MAX_K + 1), "the limit of the kernel is where int32 ends")
    one = torch.zeros(1, 64, dtype=torch.uint8)

    def refused(call) -> bool:
        try:
            call()
        except ValueError as error:
            return "MAX" in str(error) or any(c.isdigit() for c in str(error))
        return False

    tally(refused(lambda: BitLinear(MAX_EXACT_K + 1, 1, device="meta")), "the layer beyond it")
    tally(refused(lambda: packed_matmul(random_int8(1, 300, 0), one, n=1, k=MAX_K + 1)), "the kernel beyond it")
    wide = torch.full((1, 2**24 + 2**18), 127, dtype=torch.int8)
    tally(refused(lambda: matmul_reference(wide, torch.ones_like(wide))), "the reference beyond int32")


@pytest.mark.check("N9", "straight-through gradients are those of float64, and every width learns", 106)
def test_straight_through(tally) -> None:
    choose = np.random.default_rng(0)
    for trial in range(100):
        m, n, k = (int(v) for v in choose.integers(1, (20, 60, 300)))
        kind, bits = ("ternary", "binary")[trial % 2], (8, 4)[trial // 2 % 2]
        layer = layer_of(kind, bits, n, k, trial)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(trial))
        x[0, 0] = 40.0  # far in the clipped region of four bits, where the gradient is the identity's all the same
        x.requires_grad_()
        grad = torch.randn(m, n, generator=torch.Generator().manual_seed(trial + 1))
        layer(x).backward(grad)
        x_q, x_inv = ACTIVATION_QUANTIZERS[bits](x)
        w_q, w_inv = WEIGHT_QUANTIZERS[kind](layer.weight)
        g = grad.double()
        errors = []
        for found, wanted in (
            (x.grad, g @ (w_q.double() / w_inv.double())),
            (layer.weight.grad, g.T @ (x_q.double() / x_inv.double())),
        ):
            errors.append(float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)))
        tally(max(errors) < 1e-6, f"{kind} {bits} {m} x {n} x {k}: {errors}")
    for kind in ("ternary", "binary", "none"):
        for bits in (8, 4):
            tally(learns(kind, bits), f"{kind} with {bits} bits does not learn")


def learns(kind: str, bits: int) -> bool:
    """Whether 200 steps more than halve the loss of finding a matrix of levels by its products."""
    layer = layer_of(kind, bits, 16, 64)
    target = random_levels("binary1", 16, 64, 3).float() / 8
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 64, generator=generator)
        loss = (layer(x) - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return math.isfinite(losses[-1]) and sum(losses[-10:]) < 0.5 * sum(losses[:10])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_hypothesis_finds_no_matrix_that_changes(format: str, n: int, k: int, seed: int) -> None:
    """Beside the drawn shapes of N3: hypothesis looks for the corners."""
    w = LEVELS[format][torch.randint(len(LEVELS[format]), (n, k), generator=torch.Generator().manual_seed(seed))]
    assert torch.equal(FORMATS[format].unpack(FORMATS[format].pack(w), n, k), w)
