"""Codes of 2 to 8 bits: their layout bit by bit, exact integer products, and float products within their rounding."""

import pytest
import torch

from bitnet_kernels import affine_matmul, pack_codes, row_bytes, unpack_codes
from bitnet_kernels.affine import MAX_AFFINE_K, affine_matmul_reference
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.native import Isa
from tests.kernels.test_matmul import needs

ISAS = [Isa.PORTABLE, Isa.AVX2, Isa.AVX512]


def problem(m: int, n: int, k: int, bits: int, groups: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "codes": torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8),
        "x": torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8),
        "scale": torch.rand(n, groups, generator=generator),
        "zero_point": torch.randint(1 << bits, (n, groups), generator=generator).float(),
        "x_inv_scale": torch.rand(m, 1, generator=generator) + 0.1,
    }


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_survive_packing(bits) -> None:
    for n, k in ((1, 1), (3, 255), (2, 256), (5, 600)):
        codes = problem(1, n, k, bits, 1)["codes"]
        packed = pack_codes(codes, bits)
        assert tuple(packed.shape) == (n, row_bytes(k, bits)) and packed.shape[1] == -(-k // 256) * 32 * bits
        assert torch.equal(unpack_codes(packed, bits, k), codes)


def test_layout_of_three_bits() -> None:
    """Two low bits in four planes of 64, then the high bit in eight planes of 32."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 64 * 3 + 5], codes[0, 32 * 2 + 7] = 0b010, 0b101
    packed = pack_codes(codes, 3)[0]
    expected = torch.zeros(96, dtype=torch.uint8)
    expected[5] |= 0b10 << 6
    expected[32 * 2 + 7 - 64] |= 0b01 << 2  # weight 71 is byte 7 of plane 1
    expected[64 + 7] |= 1 << 2
    assert packed.tolist() == expected.tolist()


def test_four_bits_share_a_byte_half_a_block_apart() -> None:
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 3], codes[0, 131] = 9, 12
    assert int(pack_codes(codes, 4)[0, 3]) == 9 | 12 << 4


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integer_products_are_exact(bits, isa) -> None:
    needs(isa)
    for m, n, k, groups in ((1, 1, 1, 1), (3, 17, 96, 3), (2, 5, 160, 10), (16, 33, 576, 9), (4, 7, 1000, 1)):
        p = problem(m, n, k, bits, groups)
        packed = pack_codes(p["codes"], bits)
        y = native.affine_matmul(
            p["x"], packed, bits, p["scale"], p["zero_point"], None, p["x_inv_scale"], isa=isa
        )  # fmt: skip
        size = k // groups
        expected = torch.zeros(m, n)
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            centered = p["codes"][:, part].long() - p["zero_point"][:, g : g + 1].long()
            expected += (p["x"][:, part].long() @ centered.t()).float() * p["scale"][:, g]
        assert torch.equal(y, expected / p["x_inv_scale"]), (m, n, k, groups)
        reference = affine_matmul_reference(p["x"], packed, bits, k, p["scale"], p["zero_point"], p["x_inv_scale"])
        assert torch.equal(y, reference)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("levels", [False, True])
def test_float_products_against_float64(bits, isa, levels) -> None:
    needs(isa)
    for m, n, k, groups in ((1, 1, 1, 1), (2, 17, 96, 3), (4, 33, 1000, 1)):
        p = problem(m, n, k, bits, groups)
        table = torch.randn(1 << bits) if levels else None
        x = torch.randn(m, k)
        y = native.affine_matmul(
            x, pack_codes(p["codes"], bits), bits, p["scale"], p["zero_point"], table, None, isa=isa
        )  # fmt: skip
        spread = p["zero_point"].repeat_interleave(k // groups, 1).double()
        w = table[p["codes"].int()].double() if table is not None else p["codes"].double() - spread
        w = w * p["scale"].repeat_interleave(k // groups, 1).double()
        bound = x.double().abs() @ w.abs().t() * 2.0**-21
        assert bool(((y - x.double() @ w.t()).abs() <= bound).all())


def test_largest_sums() -> None:
    k = 60_000
    codes = torch.full((1, k), 255, dtype=torch.uint8)
    x = torch.full((1, k), -128, dtype=torch.int8)
    one = torch.ones(1, 1)
    for zero_point in (0.0, 255.0):
        y = affine_matmul(
            x, pack_codes(codes, 8), 8, k=k, scale=one, zero_point=torch.full((1, 1), zero_point), x_inv_scale=one
        )
        assert float(y) == float(torch.tensor((255 - int(zero_point)) * -128 * k, dtype=torch.float32))


def test_what_does_not_fit_is_refused() -> None:
    p = problem(2, 3, 64, 4, 2)
    packed = pack_codes(p["codes"], 4)
    good = {"k": 64, "scale": p["scale"], "zero_point": p["zero_point"], "x_inv_scale": p["x_inv_scale"]}
    affine_matmul(p["x"], packed, 4, **good)
    for change, named in (
        ({"k": 63}, "x must be"),
        ({"scale": p["scale"][:2]}, "scale and zero_point must be"),
        ({"scale": p["scale"].double()}, "float32"),
        ({"x_inv_scale": None}, "int8 activations"),
        ({"x_inv_scale": p["x_inv_scale"][:1]}, "x_inv_scale must be float32 with 2 values"),
        ({"x_inv_scale": p["x_inv_scale"].double()}, "x_inv_scale must be float32 with 2 values"),
        ({"scale": torch.ones(3, 48), "zero_point": torch.ones(3, 48)}, "64 inputs cannot be 48 groups"),
    ):
        with pytest.raises(ValueError, match=named):
            affine_matmul(p["x"], packed, 4, **{**good, **change})
    with pytest.raises(ValueError, match="table must be float32 with 16 values"):
        affine_matmul(p["x"].float(), packed, 4, **{**good, "x_inv_scale": None}, table=torch.ones(8))
    with pytest.raises(ValueError, match="3-bit codes"):
        affine_matmul(p["x"], packed, 3, **good)
    with pytest.raises(ValueError, match="does not fit 2 bits"):
        pack_codes(p["codes"] | 8, 2)
    with pytest.raises(ValueError, match="at most 65793"):
        wide = torch.zeros(1, MAX_AFFINE_K + 1, dtype=torch.int8)
        affine_matmul(wide, packed, 4, **{**good, "k": MAX_AFFINE_K + 1})
