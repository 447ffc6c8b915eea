"""Matrices quantized together, against integers of Python: interpreted, or on a GPU (``TRITON_INTERPRET=0``)."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no CUDA device")
    return "cpu" if INTERPRETED else "cuda"


def matrices() -> list[Tensor]:
    """Of one program and of several; large, tiny and zero weights; a mean far from zero."""
    torch.manual_seed(0)
    shapes = [(3, 5), (70, 130), (64, 64), (1, 1), (64, 128), (90, 100)]
    scales = [1.0, 0.02, 1e-7, 3.0, 1000.0, 0.3]
    found = [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    found[5] += 0.2
    return [*found, torch.zeros(5, 7), torch.full((4, 4), 0.3)]


def mean_by_python(values: Tensor) -> np.float32:
    """Of whole multiples of 2^-40, rounded half to even, as a fraction."""
    total = sum(round(Fraction(v) * 2**40) for v in values.flatten().tolist())
    return np.float32(float(Fraction(total, 2**40 * values.numel())))


@pytest.mark.parametrize("binary", [False, True])
def test_scales_and_levels(device: str, binary: bool) -> None:
    from bitnet_kernels.triton_levels import quantize_matrices

    ws = matrices()
    on_device = [w.to(device) for w in ws]
    parts, scales = quantize_matrices(on_device, binary)
    for before, w, q, (inv_scale, mean) in zip(ws, on_device, parts, scales.tolist(), strict=True):
        assert torch.equal(before, w.cpu())
        assert q.dtype == torch.int8 and q.shape == w.shape and q.data_ptr() % 16 == 0
        magnitude = max(mean_by_python(before.abs()), np.float32(1e-5))
        assert np.float32(inv_scale) == np.float32(1) / magnitude
        expected_mean = mean_by_python(before) if binary else np.float32(0)
        assert np.float32(mean) == expected_mean
        values = before.numpy()
        if binary:
            levels = np.where(values > expected_mean, 1, -1)
        else:
            levels = np.clip(np.rint(values * np.float32(inv_scale)), -1, 1)
        assert np.array_equal(q.cpu().numpy(), levels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**22])
@pytest.mark.parametrize("binary", [False, True])
def test_a_weight_that_is_not_finite(device: str, binary: bool, value: float) -> None:
    from bitnet_kernels.triton_levels import quantize_matrices

    good, bad = torch.randn(9, 9), torch.randn(80, 80)
    bad[77, 3] = value
    parts, scales = quantize_matrices([w.to(device) for w in (good, bad)], binary)
    assert scales[0].isfinite().all() and parts[0].any()
    assert scales[1, 0].isnan() and bool(scales[1, 1].isnan()) == binary
    assert not parts[1].any()
