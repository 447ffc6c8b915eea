"""The packed product on the CPU equals float64, bit for bit: every instruction set of this machine, every odd shape."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bitnet_kernels import FORMATS, MAX_K, packed_matmul
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.native import Isa
from tests.kernels.conftest import exact, random_int8, random_levels

RESIDENT = ["ternary2", "binary1"]


def needs(isa: Isa) -> None:
    best = native.best_isa()
    if isa > best or (isa == Isa.NEON and best != Isa.NEON):
        pytest.skip(f"this machine has no {isa.name} (its best is {best.name})")


def product(x: Tensor, w: Tensor, format: str, **scales: Tensor) -> Tensor:
    return packed_matmul(x, FORMATS[format].pack(w), format, n=w.shape[0], k=w.shape[1], **scales)


@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name)
@pytest.mark.parametrize("format", RESIDENT)
def test_tiles_and_their_edges(format: str, isa: Isa) -> None:
    needs(isa)
    planes = FORMATS[format].planes
    for m in (1, 2, 3, 16, 17, 33, 64, 100):
        for n, k in ((1, 256), (31, 257), (32, 512), (33, 1000), (70, 1300)):
            x, w = random_int8(m, k, m), random_levels(format, n, k, n)
            y = native.packed_matmul(x, FORMATS[format].pack(w), planes, k, None, None, isa=isa)
            assert torch.equal(y.double(), exact(x, w)), (m, n, k)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("format", RESIDENT)
def test_large_and_on_several_threads(format: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        for m, n, k in ((1, 4095, 4097), (5, 300, 6912), (700, 40, 2816)):
            x, w = random_int8(m, k, 1), random_levels(format, n, k, 2)
            assert torch.equal(product(x, w, format).double(), exact(x, w))
    finally:
        torch.set_num_threads(1)


def test_inputs_of_any_layout() -> None:
    w = random_levels("ternary2", 40, 300, 0)
    base = random_int8(600, 600, 1)
    for x in (base[:7, :300], base[::3, :300], base[:300, :9].t(), base[3:4, 5:305], base[:1, :300].expand(5, 300)):
        assert torch.equal(product(x, w, "ternary2").double(), exact(x, w))
    packed = FORMATS["ternary2"].pack(w)
    wider = torch.cat([packed, packed], dim=1)[:, : packed.shape[1]]  # rows that do not adjoin
    y = packed_matmul(base[:2, :300], wider, n=40, k=300)
    assert torch.equal(y.double(), exact(base[:2, :300], w))


@pytest.mark.parametrize("format", RESIDENT)
def test_a_row_of_a_batch_equals_the_row_alone(format: str) -> None:
    x, w = random_int8(40, 700, 3), random_levels(format, 65, 700, 4)
    x_inv, w_inv = torch.rand(40) + 0.1, torch.rand(65) + 0.1
    batch = product(x, w, format, x_inv_scale=x_inv, w_inv_scale=w_inv)
    for i in range(40):
        alone = product(x[i : i + 1], w, format, x_inv_scale=x_inv[i : i + 1], w_inv_scale=w_inv)
        assert torch.equal(batch[i : i + 1], alone)


@pytest.mark.parametrize("format", RESIDENT)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_epilogue(format: str, per_row: bool) -> None:
    """One rounding of the product of the scales, one of the quotient: float64 quotients rounded once agree."""
    x, w = random_int8(9, 500, 5), random_levels(format, 50, 500, 6)
    x_inv = torch.rand(9, 1) * 40 + 0.01
    w_inv = torch.rand(50 if per_row else 1) * 100 + 0.01
    y = product(x, w, format, x_inv_scale=x_inv, w_inv_scale=w_inv)
    expected = (exact(x, w) / (x_inv * w_inv).double()).float()
    assert torch.equal(y, expected)
    half = product(x, w, format, x_inv_scale=x_inv, w_inv_scale=w_inv, out_dtype=torch.bfloat16)
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.parametrize("format", RESIDENT)
@pytest.mark.parametrize("group_size", [64, 128, 192, 512])
def test_group_scales(format: str, group_size: int) -> None:
    """In ascending order of groups, every product and every sum rounded to float32 by numpy."""
    k = 700
    x, w = random_int8(5, k, 7), random_levels(format, 33, k, 8)
    groups = -(-k // group_size)
    scale = torch.randn(33, groups)
    x_inv = torch.rand(5) + 0.5
    y = product(x, w, format, group_scale=scale, group_size=group_size, x_inv_scale=x_inv)
    expected = torch.zeros(5, 33).numpy()
    for g in range(groups):
        part = slice(g * group_size, (g + 1) * group_size)
        sums = exact(x[:, part], w[:, part]).float().numpy()
        expected = expected + sums * scale[:, g].numpy()
    assert torch.equal(y, torch.from_numpy(expected / x_inv[:, None].numpy()))


def test_nan_and_zero_scales_stay_visible() -> None:
    x, w = random_int8(2, 64, 9), random_levels("ternary2", 3, 64, 10)
    y = product(x, w, "ternary2", x_inv_scale=torch.tensor([float("nan"), 1.0]), w_inv_scale=torch.ones(1))
    assert y[0].isnan().all()
    assert torch.equal(y[1].double(), exact(x, w)[1])


def test_what_is_not_supported_raises() -> None:
    x, w = random_int8(2, 300, 0), random_levels("ternary2", 4, 300, 0)
    packed = FORMATS["ternary2"].pack(w)
    one, ok = torch.ones(1), {"n": 4, "k": 300}
    for arguments, options, message in (
        ((x.float(), packed), ok, "x must be int8"),
        ((x[:, :299], packed), ok, "x must be int8"),
        ((x, packed.char()), ok, "torch.int8"),
        ((x, packed), {"n": 5, "k": 300}, "5 x 300"),
        ((x, packed, "ternary_base3"), ok, "the kernels read ternary2, binary1"),
        ((x, packed, "int2"), ok, "'int2'"),
        ((x, packed), {"n": 4, "k": MAX_K + 1}, "where int32 sums end"),
        ((x, packed), {**ok, "x_inv_scale": one}, "go together"),
        ((x, packed), {**ok, "x_inv_scale": torch.ones(3), "w_inv_scale": one}, "must have 2 values"),
        ((x, packed), {**ok, "x_inv_scale": torch.ones(2), "w_inv_scale": torch.ones(3)}, "1 or 4 values"),
        ((x, packed), {**ok, "x_inv_scale": torch.ones(2), "w_inv_scale": one.double()}, "must be float32"),
        ((x, packed), {**ok, "row_sum": x.sum(-1)}, "row_sum must be int32"),
        ((x, packed), {**ok, "row_sum": torch.zeros(3, dtype=torch.int32)}, "row_sum must be int32"),
        ((x, packed), {**ok, "group_scale": torch.ones(4, 5), "group_size": 60}, "multiples of 64"),
        ((x, packed), {**ok, "group_scale": torch.ones(4, 4), "group_size": 64}, r"must be \(4, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_matmul(*arguments, **options)
    with pytest.raises(ValueError, match="packed on meta"):
        packed_matmul(x, packed.to("meta"), **ok)
    scales = {"x_inv_scale": torch.ones(2), "w_inv_scale": one}
    for name in (*scales, "row_sum"):  # what C would read from an address of another device
        elsewhere = {**ok, **scales, name: torch.zeros(2, dtype=torch.int32)[: 2 - (name == "w_inv_scale")]}
        elsewhere[name] = elsewhere[name].to(torch.int32 if name == "row_sum" else torch.float32).to("meta")
        with pytest.raises(ValueError, match=f"{name} on meta"):
            packed_matmul(x, packed, **elsewhere)


@pytest.mark.parametrize("format", ["ternary2", "binary1"])
def test_sums_of_rows_lie_anywhere(format: str) -> None:
    x, w = random_int8(3, 300, 0), random_levels(format, 9, 300, 1)
    sums = torch.stack([x.sum(1), torch.full((3,), 99)], dim=1).int()[:, 0]
    y = packed_matmul(x, FORMATS[format].pack(w), format, n=9, k=300, row_sum=sums)
    assert torch.equal(y.double(), exact(x, w))


def test_no_tokens_in_a_thread_that_has_multiplied_nothing_yet() -> None:
    """Each thread of C keeps working memory, of which no bytes are needed here: that is no lack of memory."""
    x, packed = random_int8(0, 300, 0), FORMATS["ternary2"].pack(random_levels("ternary2", 9, 300, 1))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(packed_matmul, x, packed, n=9, k=300).result().shape == (0, 9)
