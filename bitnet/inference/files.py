"""Packed model files: one safetensors file that holds everything needed to serve a model (layout in ``header.py``).

Reading streams the tensors straight into the memory they are used from, checking digests on the way: the file is never
held twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitnet.checkpoint import build, load_checkpoint
from bitnet.errors import UserError
from bitnet.inference.header import (
    FORMAT_VERSION,
    NO_DIGEST,
    PackedFile,
    damaged,
    read_header,
    seal_of,
    stream,
    with_seal,
)
from bitnet.inference.packed_linear import LayerForm, PackedLinear
from bitnet.inference.packed_model import PackedTransformer
from bitnet.inference.packing import LayerForms, packed_skeleton
from bitnet.input_transforms import TRANSFORMS
from bitnet.layers import quantized_layers
from bitnet.model import Transformer
from bitnet.recipes import POST_TRAINING
from bitnet.tensor_file import bytes_of, layout, write
from bitnet_kernels import FORMATS
from bitnet_kernels.cpu.memory import empty_in_huge_pages

if TYPE_CHECKING:
    from tokenizers import Tokenizer


ON_GRID = tuple(kind.__name__ for kind in POST_TRAINING.values())
"""Recipes whose layers are not ``PackedLinear``: they build the layers of a packed file that they are named in."""


def _stored_tensors(model: PackedTransformer) -> dict[str, Tensor]:
    """Every tensor of a packed model, once each, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _packed_layers(model: PackedTransformer) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def _recipe_of(model: PackedTransformer, layers: dict[str, PackedLinear]) -> dict[str, Any]:
    """What the layers themselves say: enough for low bits. ``UserError`` for integer grids, whose recipe says more."""
    if quantized_layers(model):
        raise UserError("recipe: weights on an integer grid need it; give bitnet.checkpoint.recipe_options(recipe).")
    if not layers:
        return {}
    layer = next(iter(layers.values()))
    return {"name": "BitNet", "weight": layer.format.rstrip("0123456789"), "act_bits": layer.form.act_bits}


def save_packed(
    model: PackedTransformer,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    format: str | None = None,
    recipe: dict[str, Any] | None = None,
    extras: dict[str, Any] | None = None,
) -> None:
    """Write a packed model to ``path``, whole or not at all; ``extras`` are those of ``bitnet.checkpoint.EXTRAS``.

    ``recipe`` is that of ``bitnet.checkpoint.recipe_options``; without it the layers tell kind and bits.
    ``format`` is ``ternary2``, ``ternary_base3`` (smaller, unpacked on load) or ``binary1``; if not given, the one that
    the layers have. Raises ``UserError`` when they cannot take it, or when the file cannot be written.
    """
    path = Path(path)
    layers = _packed_layers(model)
    tensors = _stored_tensors(model)
    forms = {}
    if format is not None and not layers:
        raise UserError(f"format {format}: is for ternary and binary weights, and this model has none; leave it out.")
    for name, layer in layers.items():
        stored = layer.format if format is None else format
        if stored not in FORMATS:
            raise UserError(f"format {stored!r}: must be one of {', '.join(FORMATS)}.")
        if FORMATS[stored].levels != FORMATS[layer.format].levels:
            raise UserError(
                f"format {stored}: {name} has the levels {FORMATS[layer.format].levels}; use {layer.format}."
            )
        if stored != layer.format:
            tensors[f"{name}.packed"] = FORMATS[stored].pack(layer.weight_levels().cpu())
        form = list(layer.form._replace(format=stored))
        while len(form) > 2 and form[-1] == LayerForm("")[len(form) - 1]:
            form.pop()  # what is as usual need not be said
        forms[name] = form
    description = {
        **(extras or {}),
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config),
        "recipe": _recipe_of(model, layers) if recipe is None else recipe,
        "head": model.head_dtype,
        "layers": forms,
        "digests": {name: hashlib.sha256(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()},
        "tokenizer": tokenizer.to_str(),
    }
    header, order = layout(tensors, {"bitnet": json.dumps(description), "sha256": NO_DIGEST})
    write(path, with_seal(header, NO_DIGEST, seal_of(header)), (tensors[name] for name in order))


def place(model: PackedTransformer) -> None:
    """Give every tensor of a skeleton memory; packed weights share huge pages, matrices that will be joined adjoin."""
    for module in model.modules():
        for name, buffer in list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False)):
            if name != "packed":
                real = torch.empty(buffer.shape, dtype=buffer.dtype)  # empty_like would import sympy: 35 MB
                is_parameter = isinstance(buffer, torch.nn.Parameter)
                setattr(module, name, torch.nn.Parameter(real, requires_grad=False) if is_parameter else real)
    if model.config.tie_embeddings and model.head_dtype == "float32":
        model.lm_head.weight = model.tok_embeddings.weight
    layers = list(_packed_layers(model).values())
    arena = empty_in_huge_pages(sum(layer.packed.numel() for layer in layers))
    start = 0
    for layer in layers:
        end = start + layer.packed.numel()
        layer.packed = arena[start:end].view(layer.packed.shape)
        start = end


def load_packed(path: str | Path, device: torch.device | str = "cpu") -> tuple[PackedTransformer, Tokenizer]:
    """``(model, tokenizer)`` of a file that ``bitnet pack`` wrote; the forward is that of ``load_checkpoint``.

    Every digest is checked. Raises ``UserError`` for a file that is damaged, too new, or no packed model.
    """

    packed = read_header(path)
    if not all(_is_known(form) for form in packed.forms.values()):
        raise damaged(packed.path, "it has layers of an unknown form")
    resident: LayerForms = {
        name: form._replace(format="ternary2") if form.format == "ternary_base3" else form
        for name, form in packed.forms.items()
    }
    try:
        _, recipe = build(packed.description) if packed.recipe.get("name") in ON_GRID else (None, None)
        model = packed_skeleton(packed.config, resident, packed.head, recipe)  # type: ignore[arg-type]
    except UserError as error:
        raise damaged(packed.path, str(error).rstrip(".")) from error
    except (RuntimeError, ValueError, TypeError) as error:  # sizes beyond what a tensor can have
        raise damaged(packed.path, "no model has its sizes") from error
    expected = _stored_tensors(model)
    layers = _packed_layers(model)
    for name, tensor in expected.items():
        shape: tuple[int, ...] = tuple(tensor.shape)
        owner = name.removesuffix(".packed")
        if owner != name:
            shape = (shape[0], FORMATS[packed.forms[owner].format].row_bytes(layers[owner].in_features))
        entry = packed.tensors.get(name)
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, shape):
            raise damaged(packed.path, f"{name} is missing or has another shape")
    if len(expected) != len(packed.tensors) or set(layers) != set(packed.forms):
        raise damaged(packed.path, "it has tensors that the model does not")
    tokenizer = _tokenizer(packed)
    place(model)
    destinations = _stored_tensors(model)
    with packed.path.open("rb") as file:
        file.seek(packed.data_start)
        for name in packed.tensors:
            owner = name.removesuffix(".packed")
            form = packed.forms[owner].format if owner != name else ""
            _fill(destinations[name], stream(file, packed, name), layers[owner] if form == "ternary_base3" else None)
    for name, layer in quantized_layers(model).items():
        at = layer.outlier_at
        if at is not None and not 0 <= int(at.min()) <= int(at.max()) < layer.in_features * layer.out_features:
            raise damaged(packed.path, f"{name} keeps weights that it does not have")
    return model.join_blocks().to(device), tokenizer


def _is_known(form: LayerForm) -> bool:
    grouped = type(form.scale_per) is int and form.scale_per > 0
    scaled = grouped or form.scale_per in ("matrix", "row")
    transformed = form.transform in ("none", *TRANSFORMS)
    named = isinstance(form.format, str) and form.format in FORMATS
    return named and form.act_bits in (8, 4, "none") and scaled and transformed


def _fill(to: Tensor, chunks: Iterator[bytearray], base3: PackedLinear | None) -> None:
    if base3 is None:
        flat, at = to.detach().view(-1).view(torch.uint8), 0
        for chunk in chunks:
            flat[at : at + len(chunk)] = torch.frombuffer(chunk, dtype=torch.uint8)
            at += len(chunk)
        return
    row = 0
    for chunk in chunks:
        stored = torch.frombuffer(chunk, dtype=torch.uint8).view(
            -1, FORMATS["ternary_base3"].row_bytes(base3.in_features)
        )
        try:
            levels = FORMATS["ternary_base3"].unpack(stored, None, base3.in_features)
        except ValueError:
            levels = torch.zeros(stored.shape[0], base3.in_features, dtype=torch.int8)  # the digest will tell
        to[row : row + stored.shape[0]] = FORMATS[base3.format].pack(levels)
        row += stored.shape[0]


def _tokenizer(packed: PackedFile) -> Tokenizer:
    from bitnet.data.tokenizer import parse_tokenizer

    try:
        return parse_tokenizer(packed.tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise damaged(packed.path, "its tokenizer cannot be read") from error


PACKED_NAME = "packed.safetensors"
"""The packed model of a run folder whose weights came in packed."""


def packed_file(path: str | Path) -> Path | None:
    """The packed model that ``path`` names, itself or as a run folder that holds one, or ``None``."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    inside = path / PACKED_NAME
    return inside if inside.is_file() else None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """``(model, tokenizer)`` of a run folder, a checkpoint or a packed model."""
    packed = packed_file(path)
    return load_checkpoint(path, device) if packed is None else load_packed(packed, device)
