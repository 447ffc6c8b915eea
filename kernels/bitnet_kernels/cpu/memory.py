"""Memory for weights that are read from end to end for every token."""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def empty_in_huge_pages(size: int) -> Tensor:
    """Uninitialised uint8 (size,), in huge pages where the system grants them.

    With small pages a matrix of a few megabytes costs as much time to translate as it does to read.
    """
    whole = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size >= HUGE_PAGE:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(whole.data_ptr() + start), ctypes.c_size_t(size // HUGE_PAGE * HUGE_PAGE), advice
            )
    return whole[start : start + size]
