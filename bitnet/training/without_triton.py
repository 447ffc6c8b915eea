"""Keep triton out of a process that cannot use it.

Lightning imports ``torch._dynamo``, which finds out whether triton is installed by importing it. Without a GPU that
takes time and gives nothing; torch then behaves as where triton is not installed, which it supports.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def triton_unseen_without_gpu() -> Iterator[None]:
    """Within this block ``import triton`` fails, unless there is a GPU or triton has been imported before."""
    if torch.cuda.is_available() or "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]
