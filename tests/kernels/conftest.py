"""Cases for the kernels: awkward shapes, extreme values, and memory that is never clean."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitnet_kernels import FORMATS

LEVELS = {name: torch.tensor(f.levels, dtype=torch.int8) for name, f in FORMATS.items()}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN and the largest integers, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def random_levels(format: str, n: int, k: int, seed: int) -> Tensor:
    """An int8 matrix (n, k) of the levels of a format."""
    levels = LEVELS[format]
    return levels[torch.randint(len(levels), (n, k), generator=torch.Generator().manual_seed(seed))]


def random_int8(m: int, k: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, w: Tensor) -> Tensor:
    """The product in float64, which holds every sum that int32 holds."""
    return x.double() @ w.double().t()
