"""A model as exporters see it, whether it was trained, packed or imported.

The scale of a low-bit matrix is the one that is served. It is never computed again from the levels: the mean magnitude
of a ternary matrix is smaller than its scale by the share of zeros.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from bitnet.errors import UserError
from bitnet.inference.packed_linear import PackedLinear, StoredEmbedding, StoredHead
from bitnet.layers import BitLinear, FakeQuantizedLinear, LoRALinear
from bitnet.layers.bit_linear import ActBits
from bitnet.layers.integer_products import dequantize
from bitnet.model import RMSNorm, Transformer, float_model


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix (N, K) of a linear layer: float, or integer levels that count ``levels / inv_scale`` (or times
    ``group_scale``)."""

    name: str
    weight: Tensor | None
    """Float: plain, or latent where there are levels; ``None`` where the latent weight was not kept."""
    levels: Tensor | None = None
    """int8, -1, 0 and 1."""
    inv_scale: Tensor | None = None
    """Float32 (1,), or (N,) with a scale for each row."""
    group_scale: Tensor | None = None
    """Float32 (N, groups), where each group of inputs has a scale."""

    def dense(self) -> Tensor:
        """What the layer multiplies by, float32 (N, K)."""
        if self.levels is None:
            assert self.weight is not None
            return self.weight.float()
        return dequantize(self.levels, self.inv_scale, self.group_scale)

    def latent(self) -> Tensor:
        """A float weight to train on; where none was kept, levels x c with the c whose absmean is the stored scale."""
        if self.weight is not None:
            return self.weight
        assert self.levels is not None and self.inv_scale is not None
        share = self.levels.count_nonzero() / self.levels.numel()
        return self.levels.float() / (self.inv_scale * share.clamp(min=1e-9))


def _matrix(name: str, linear: nn.Module) -> Matrix:
    if getattr(linear, "bias", None) is not None:
        raise UserError(f"{name} has a bias; no export format of this model family has room for it.")
    if isinstance(linear, PackedLinear | BitLinear) and linear.transform != "none":
        raise UserError(f"{name} has transform = {linear.transform}; no other program computes that.")
    if isinstance(linear, PackedLinear):
        scales = {"inv_scale": linear.inv_scale, "group_scale": linear.group_scale}
        return Matrix(name=name, weight=None, levels=linear.weight_levels(), **scales)
    if isinstance(linear, BitLinear) and linear.weight_kind != "none":
        found = linear.levels()
        scales = {"inv_scale": found.inv_scale.reshape(-1), "group_scale": found.group_scale}
        return Matrix(name=name, weight=linear.weight.detach(), levels=found.q, **scales)
    if isinstance(linear, FakeQuantizedLinear):
        w = linear.dense().detach()
        return Matrix(name=name, weight=w + linear.adapter().detach() if isinstance(linear, LoRALinear) else w)
    assert isinstance(linear, nn.Linear)
    return Matrix(name=name, weight=linear.weight.detach())


def matrices(model: Transformer) -> Iterator[Matrix]:
    """The linears of the blocks, one at a time."""
    kinds = (PackedLinear, FakeQuantizedLinear, nn.Linear)
    for number, block in enumerate(model.layers):
        for name, module in block.named_modules():
            if isinstance(module, kinds):
                yield _matrix(f"layers.{number}.{name}", module)


def vectors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every norm: our name and its weight."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield name, module.weight.detach()


def tables(model: Transformer) -> dict[str, Tensor]:
    """The embedding, and the head where it is not the same matrix, float32 (V, D)."""
    found = {}
    for name in ("tok_embeddings", "lm_head"):
        if name == "lm_head" and model.config.tie_embeddings:
            continue
        module = model.get_submodule(name)
        stored = isinstance(module, StoredEmbedding | StoredHead)
        found[name] = module.table.rows(slice(None)) if stored else module.weight.detach()  # type: ignore[union-attr,operator]
    return found


def forms(model: Transformer) -> tuple[str, ActBits]:
    """``(weights, activation bits)`` of the blocks: weights are ternary, binary or none (float).

    Raises ``UserError`` where blocks differ, or a matrix has more than one scale: no low-bit export can say so.
    """
    found: set[tuple[str, ActBits]] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | BitLinear) and module.scale_per != "matrix":
            what = "row" if module.scale_per == "row" else f"group of {module.scale_per} inputs"
            raise UserError(
                f"{name} has a scale for each {what}, and low-bit exports take one for the matrix; "
                "--form dense and --type f16 hold it."
            )
        if isinstance(module, PackedLinear):
            found.add(("binary" if module.format == "binary1" else "ternary", module.act_bits))
        elif isinstance(module, BitLinear):
            found.add((module.weight_kind, module.act_bits))
    if len(found) > 1:
        listed = ", ".join(f"{weight} weights with {bits}-bit activations" for weight, bits in sorted(found, key=str))
        raise UserError(
            f"the layers of this model differ ({listed}), which no low-bit export can say; "
            "--form dense and --type f16 keep the activations in floating point."
        )
    return found.pop() if found else ("none", "none")


def float_state(model: Transformer, weight_of: Callable[[Matrix], Tensor]) -> dict[str, Tensor]:
    """A state dict of the plain float layout; ``weight_of`` chooses what stands for a matrix.

    A tied head is one tensor under both names, as in a run.
    """
    state = {f"{matrix.name}.weight": weight_of(matrix) for matrix in matrices(model)}
    state |= {f"{name}.weight": weight for name, weight in (*vectors(model), *tables(model).items())}
    state.setdefault("lm_head.weight", state["tok_embeddings.weight"])
    return state


def without_activation_quantization(model: Transformer) -> Transformer:
    """The float model that multiplies by the dense form of every matrix: the graph alone."""
    return float_model(model.config, float_state(model, Matrix.dense))
