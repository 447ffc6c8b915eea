"""From a trained model to the model that is served: ``pack``."""

import copy

import torch
from torch import nn

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.inference.packed_linear import HeadDtype, LayerForm, PackedLinear, StoredEmbedding, StoredHead, Table
from bitnet.inference.packed_model import PackedTransformer
from bitnet.layers import quantized_layers, swap_linears
from bitnet.layers.bit_linear import BitLinear, low_bit_layers
from bitnet.model import Transformer, without_memory
from bitnet.recipes import Recipe

HEAD_DTYPES: tuple[HeadDtype, ...] = ("float32", "float16", "bfloat16", "int8")
LayerForms = dict[str, LayerForm]
"""By name of the linear."""


def packed_skeleton(
    config: ModelConfig, forms: LayerForms, head: HeadDtype, recipe: Recipe | None = None
) -> PackedTransformer:
    """A packed model on the meta device, before its blocks are joined; ``recipe`` makes the layers on a grid."""

    def packed_linear(name: str, linear: nn.Linear) -> nn.Module | None:
        if name not in forms:
            return None
        return PackedLinear(linear.in_features, linear.out_features, **forms[name]._asdict())

    with without_memory():
        model = PackedTransformer(config)
        model.head_dtype = head
        swap_linears(model, packed_linear)
        if recipe is not None:
            recipe.prepare(model)
            recipe.finalize(model)
            for layer in quantized_layers(model).values():
                layer.pack()
        if head != "float32":
            table = Table(config.vocab_size, config.dim, head)
            model.tok_embeddings = StoredEmbedding(table)  # type: ignore[assignment]
            own = table if config.tie_embeddings else Table(config.vocab_size, config.dim, head)
            model.lm_head = StoredHead(own)  # type: ignore[assignment]
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def pack(model: Transformer, head: HeadDtype = "float32") -> PackedTransformer:
    """The packed form of a trained model; ``model`` itself stays as it is.

    ``head`` is the storage of embedding and output head: ``float32`` keeps them as trained, so that logits are
    bit-equal; the others are smaller and round. Norms, and linears that were not trained in low bits, are
    shared with ``model``.
    Raises ``UserError`` for a model without low-bit layers.
    """
    if head not in HEAD_DTYPES:
        raise UserError(f"head = {head}: must be one of {', '.join(HEAD_DTYPES)}.")
    layers, on_grid = low_bit_layers(model), quantized_layers(model)
    if not layers and not on_grid:
        raise UserError("the model has no low-bit layers: there is nothing to pack (was weight set to 'none'?).")
    kept = [n for n, m in model.named_modules() if isinstance(m, BitLinear) and n not in layers]
    if kept:
        raise UserError(f"{kept[0]} has low-bit activations but float weights; such layers have no packed form.")
    parts = {name: PackedLinear.from_bit_linear(layer) for name, layer in layers.items()}
    forms: LayerForms = {name: part.form for name, part in parts.items()}
    packed = packed_skeleton(model.config, forms, head)
    for name, part in parts.items():
        packed.set_submodule(name, part)
    for name, layer in on_grid.items():
        copied = copy.deepcopy(layer)
        copied.pack()
        packed.set_submodule(name, copied.requires_grad_(False))
    if head != "float32":
        table = Table.from_weight(model.tok_embeddings.weight, head)
        packed.tok_embeddings = StoredEmbedding(table)  # type: ignore[assignment]
        tied = model.config.tie_embeddings
        packed.lm_head = StoredHead(table if tied else Table.from_weight(model.lm_head.weight, head))  # type: ignore[assignment]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if (
            owner not in layers
            and owner not in on_grid
            and isinstance(packed.get_submodule(owner), type(model.get_submodule(owner)))
        ):
            setattr(packed.get_submodule(owner), leaf, nn.Parameter(parameter.detach(), requires_grad=False))
    if head == "float32" and model.config.tie_embeddings:
        packed.lm_head.weight = packed.tok_embeddings.weight
    return packed.join_blocks()
