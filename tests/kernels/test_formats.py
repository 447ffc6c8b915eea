"""Packing: 5,000 random matrices come back as they were, bits lie where the drawings say, bad input is refused."""

import pytest
import torch

from bitnet_kernels import FORMATS
from tests.kernels.conftest import LEVELS, random_levels

FORMAT_NAMES = sorted(FORMATS)


def test_ternary2_by_hand() -> None:
    w = torch.zeros(1, 300, dtype=torch.int8)
    w[0, 0], w[0, 64], w[0, 129], w[0, 255], w[0, 256] = 1, -1, 1, -1, 1
    packed = FORMATS["ternary2"].pack(w)
    assert packed.shape == (1, 128)
    zero = 0b01010101  # four weights 0
    assert packed[0, 0] == 0b01010010  # weight 0 is +1 (code 2, lowest bits), weight 64 is -1 (code 0, next bits)
    assert packed[0, 1] == 0b01100101  # weight 129 = plane 2, byte 1
    assert packed[0, 63] == 0b00010101  # weight 255 = plane 3, byte 63
    assert packed[0, 64] == 0b01010110  # weight 256 begins the second block
    assert packed[0, 2] == zero
    assert packed[0, 127] == zero  # padding is weight 0


def test_binary1_by_hand() -> None:
    w = -torch.ones(1, 260, dtype=torch.int8)
    w[0, 0], w[0, 32], w[0, 255], w[0, 257] = 1, 1, 1, 1
    packed = FORMATS["binary1"].pack(w)
    assert packed.shape == (1, 64)
    assert packed[0, 0] == 0b00000011  # weights 0 and 32: planes 0 and 1 of byte 0
    assert packed[0, 31] == 0b10000000  # weight 255 = plane 7, byte 31
    assert packed[0, 33] == 0b00000001  # weight 257 = plane 0, byte 1 of the second block
    assert int(packed.sum()) == 0b00000011 + 0b10000000 + 1


def test_base3_by_hand() -> None:
    w = torch.tensor([[1, 0, -1, 0, 1, -1]], dtype=torch.int8)
    packed = FORMATS["ternary_base3"].pack(w)
    assert packed.tolist() == [[2 + 1 * 3 + 0 * 9 + 1 * 27 + 2 * 81, 0 + (3 + 9 + 27 + 81)]]


@pytest.mark.parametrize("k", [256, 512])
def test_a_matrix_can_be_cut_at_every_block(k: int) -> None:
    for format in ("ternary2", "binary1"):
        w = random_levels(format, 5, 2 * k, k)
        whole = FORMATS[format].pack(w)
        halves = [FORMATS[format].pack(part.contiguous()) for part in w.split(k, dim=1)]
        assert torch.equal(whole, torch.cat(halves, dim=1))


def test_bits_per_weight() -> None:
    for name, f in FORMATS.items():
        assert f.row_bytes(2560) * 8 / 2560 == f.bits, name
    assert FORMATS["ternary2"].row_bytes(1) == 64
    assert FORMATS["binary1"].row_bytes(257) == 64
    assert FORMATS["ternary_base3"].row_bytes(6) == 2


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_bad_matrices_are_refused(format: str) -> None:
    pack = FORMATS[format].pack
    good = LEVELS[format][:1].repeat(2, 3)
    bad = good.clone()
    bad[1, 2] = 2
    with pytest.raises(ValueError, match="w holds 2"):
        pack(bad)
    with pytest.raises(ValueError, match="int8 matrix"):
        pack(good.float())
    with pytest.raises(ValueError, match="int8 matrix"):
        pack(good[0])
    with pytest.raises(ValueError, match="no columns"):
        pack(good[:, :0])
    with pytest.raises(ValueError, match=r"torch\.int8"):
        FORMATS[format].unpack(good, None, None)


def test_binary_has_no_zero_and_base3_no_byte_above_242() -> None:
    with pytest.raises(ValueError, match="w holds 0"):
        FORMATS["binary1"].pack(torch.zeros(1, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="byte 243"):
        FORMATS["ternary_base3"].unpack(torch.tensor([[243]], dtype=torch.uint8), 1, 5)
