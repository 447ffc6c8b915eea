"""What a low-bit method is: how a float transformer takes on low-bit weights, and which loss it is trained with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import Tensor, nn

from bitnet.loss import next_token_loss

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(label: str, done: int, total: int) -> None:
    """Says nothing."""


class Recipe(ABC):
    """How a float transformer takes on low-bit weights."""

    needs_text: ClassVar[bool] = False
    """Whether ``prepare`` needs batches to do what the method is about."""
    trains: ClassVar[bool] = True
    """Whether ``fit`` has something to train; the others are for ``bitnet quantize``."""

    @property
    def needs_parent(self) -> bool:
        """Whether it starts from a trained model."""
        return False

    @property
    def begins_in_float(self) -> bool:
        """Whether layers compute with latent weights, wholly or in part, in the first steps."""
        return False

    @abstractmethod
    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        """Swap layers in place; return the names of those changed. ``batches`` of token ids (B, T) calibrate, and then
        the model should be in evaluation mode.

        Without batches the layers have the same form, ready for a checkpoint to fill.
        """

    def blend(self, step: int, total_steps: int) -> float:
        """How far layers are from float (0) to low bits (1) at ``step``; default: 1 in every step."""
        return 1.0

    def on_step(self, model: nn.Module, step: int, total_steps: int) -> None:  # noqa: B027 - an optional hook
        """Called before optimizer step ``step`` of ``total_steps``; default: nothing."""

    def served(self, step: int, total_steps: int) -> "Recipe":
        """The recipe whose ``prepare`` gives the layers of a model saved at ``step``; default: this one."""
        return self

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Training loss of a batch, a scalar; default: next-token cross-entropy."""
        return next_token_loss(model, batch)

    def finalize(self, model: nn.Module) -> None:  # noqa: B027 - an optional hook
        """Merge or fold what training left beside the weights; default: nothing."""
