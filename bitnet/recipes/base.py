"""What a low-bit method is: how a float transformer takes on low-bit weights, and which loss it is trained with."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from bitnet.loss import next_token_loss


class Recipe(ABC):
    """How a float transformer takes on low-bit weights."""

    @abstractmethod
    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = ()) -> list[str]:
        """Swap layers in place; return the names of those changed. ``batches`` of token ids serve for calibration."""

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
