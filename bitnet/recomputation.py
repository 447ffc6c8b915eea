"""Activation checkpointing: backward computes the inside of a block again instead of having kept it.

What is kept of a block is its input. The second computation is the first over again, with the same random numbers, so
the gradients have the same bits. What a forward leaves behind besides its result, such as the running limits of static
activation scales, must happen once: whoever does such a thing asks ``is_recomputing`` first.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_again: ContextVar[bool] = ContextVar("again", default=False)  # backward may run in a thread of its own


def is_recomputing() -> bool:
    """Whether this forward is the second one, in backward."""
    return _again.get()


@contextmanager
def _recomputing() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _recomputing()


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """``block(*inputs)``, of which only ``inputs`` are kept for backward."""
    y: Tensor = checkpoint(block, *inputs, use_reentrant=False, context_fn=_contexts)
    return y
