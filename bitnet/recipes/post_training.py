"""What the recipes that start from a trained float model share: how its linears are put on an integer grid.

``prepare`` without batches makes the layers and gives every grid the range of its weights (round to nearest); on the
meta device it makes their shapes only, for a checkpoint to fill. With batches of token ids, recipes that look at
activations do so.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from bitnet.affine import Scheme
from bitnet.errors import UserError
from bitnet.layers import ActivationScheme, BitLinear, FakeQuantizedLinear, quantized_layers, swap_linears
from bitnet.layers.fake_quantized_linear import State
from bitnet.recipes.base import Progress, Recipe, no_progress

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
PostActBits = Literal[4, 5, 6, 7, 8, "none"]


@dataclass(frozen=True, kw_only=True)
class PostTraining(Recipe):
    """Common fields; a subclass says what it does with them."""

    trains: ClassVar[bool] = False

    bits: Bits = 4
    """Bits of the weights."""
    group_size: int = 64
    """Inputs that share a scale; 0 for one scale per output."""
    symmetric: bool = False
    """Leave out the zero points."""
    # Not called act_bits: a config that changes the recipe would carry BitNet's value over.
    activation_bits: PostActBits = "none"
    """Bits of the activations, one scale per token; none for float activations."""

    found: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What ``prepare`` found out: chosen settings and errors, for reports."""

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise UserError(f"group_size = {self.group_size}: must be 0 (per output) or positive.")
        self.grid()
        self.activations("")

    @property
    def needs_parent(self) -> bool:
        return True

    # ---- what the layers look like

    def grid(self) -> Any:
        """The integer grid (or codebook) of the weights."""
        granularity: Literal["group", "channel"] = "group" if self.group_size else "channel"
        return Scheme(
            bits=self.bits, granularity=granularity, group_size=self.group_size or 1, symmetric=self.symmetric
        )

    def activations(self, name: str) -> ActivationScheme | None:
        """How the inputs of the linear at path ``name`` become integers."""
        return None if self.activation_bits == "none" else ActivationScheme(bits=self.activation_bits)

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        """Further arguments of the layer at path ``name``."""
        return {"act": self.activations(name)}

    def state(self) -> State:
        """State of the layers after ``prepare``."""
        return "frozen"

    kind: ClassVar[type[FakeQuantizedLinear]] = FakeQuantizedLinear

    def layer(self, name: str, linear: nn.Linear, state: State | None = None) -> FakeQuantizedLinear:
        """The layer that replaces ``linear``, its weights rounded to nearest."""
        if isinstance(linear, BitLinear):
            raise UserError(f"{name} is a trained low-bit layer; this recipe starts from a float model.")
        if not linear.weight.is_meta and not bool(linear.weight.isfinite().all()):
            raise UserError(f"{name} has weights that are NaN or infinite; no grid holds them.")
        size = self.group_size
        if size and linear.in_features % size:
            raise UserError(f"group_size = {size} does not divide the {linear.in_features} inputs of {name}.")
        layer: FakeQuantizedLinear = self.kind.from_linear(
            linear, grid=self.grid(), state=state or self.state(), **self.options(name, linear)
        )
        return layer

    # ---- the recipe

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        names = swap_linears(model, self.layer)
        train_only(model, self.is_trained)
        return names

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter of that name is trained by ``fit``; default: nothing is."""
        return False

    def finalize(self, model: nn.Module) -> None:
        for layer in quantized_layers(model).values():
            layer.freeze()


def train_only(model: nn.Module, wanted: Callable[[str, nn.Parameter], bool]) -> None:
    """Set ``requires_grad`` of every parameter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name, parameter))


@dataclass(frozen=True, kw_only=True)
class RTN(PostTraining):
    r"""Round to nearest: every weight takes the nearest point of a grid from the smallest to the largest; no data.

    ``scale = (max - min) / (2^b - 1)``, ``zero_point = round(-min / scale)``, ``q = round(w / scale) + zero_point``
    (arXiv 1712.05877, section 2). The baseline of every other method.
    """
