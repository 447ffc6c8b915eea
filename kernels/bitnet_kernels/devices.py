"""Triton launches on the device that is current, which need not be the one that holds the tensors."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(function: F) -> F:
    """``function`` with the device of its first argument, a tensor or a list of them, as the current one."""

    @functools.wraps(function)
    def launched(first: Any, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *others, **options)

    return launched  # type: ignore[return-value]
