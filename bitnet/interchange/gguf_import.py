"""A GGUF file of the architectures llama and bitnet as a model of ours.

Matrices of the ternary types stay ternary where a matrix has one scale, as ours and llama.cpp's converters write them;
every other type (Q4_1, Q8_0, K-quants, F16, ...) is dequantized to float32: what was lost by it stays lost, and the
origin says so.
"""

import collections
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.inference.files import place
from bitnet.inference.packed_linear import LayerForm, PackedLinear
from bitnet.inference.packed_model import PackedTransformer
from bitnet.inference.packing import packed_skeleton
from bitnet.interchange.gguf_blocks import separate_rows
from bitnet.interchange.gguf_file import GgufFile
from bitnet.interchange.gguf_tokenizer import read_tokenizer
from bitnet.interchange.names import GGUF
from bitnet.interchange.opened import Opened, config_of
from bitnet.model import RMSNorm, Transformer, float_model, without_memory
from bitnet_kernels import FORMATS

ARCHITECTURES = {"llama": (False, "silu"), "bitnet": (True, "silu"), "bitnet-b1.58": (True, "relu2")}
"""Sub-norms and activation of the graph that each name stands for."""
TERNARY = ("TQ1_0", "TQ2_0")


def _config(get: Any, tied: bool, file: Path) -> ModelConfig:
    arch = get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"{file}: architecture {arch!r}; this library has the graphs of {', '.join(ARCHITECTURES)}.")
    sub_norm, activation = ARCHITECTURES[arch]

    def number(key: str, default: Any = None) -> Any:
        value = get(f"{arch}.{key}", default)
        if value is None:
            raise UserError(f"{file}: has no {arch}.{key}.")
        return value

    if get(f"{arch}.rope.scaling.type", "none") != "none":
        raise UserError(f"{file}: scaled rotary positions are not in this graph.")
    if get(f"{arch}.expert_count", 0):
        raise UserError(f"{file}: a mixture of experts is not in this graph.")
    heads, dim = number("attention.head_count"), number("embedding_length")
    config = config_of(
        file,
        vocab_size=number("vocab_size", len(get("tokenizer.ggml.tokens", []))),
        dim=dim,
        n_layers=number("block_count"),
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        ffn_dim=number("feed_forward_length"),
        max_seq_len=number("context_length"),
        activation=activation,
        sub_norm=sub_norm,
        tie_embeddings=tied,
        norm_eps=float(str(np.float32(number("attention.layer_norm_rms_epsilon")))),  # 1e-05, as it was meant
        rope_theta=number("rope.freq_base", 10_000.0),
    )
    if number("rope.dimension_count", config.head_dim) != config.head_dim:
        raise UserError(f"{file}: rotary positions over a part of the head are not in this graph.")
    return config


def _ternary(dense: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(levels, inv_scale)`` of a matrix with values -s, 0 and s; ``None`` for any other."""
    scale = dense.abs().max()
    levels = (dense / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return (levels.to(torch.int8), scale.reciprocal().reshape(1)) if torch.equal(levels * scale, dense) else None


class _Reader:
    """Tensors of a GGUF file by our names, dequantized one at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content = GgufFile(file)
        self.names: dict[str, str] = {}
        for name in self.content.tensors:
            module, _, leaf = name.rpartition(".")
            ours = GGUF.ours(module)
            if name.startswith("rope_freqs"):
                raise UserError(f"{file}: scaled rotary positions ({name}) are not in this graph.")
            if ours is None or leaf != "weight":
                raise UserError(f"{file}: {name} has no place in this graph.")
            self.names[ours] = name

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.fields.get(key, default)

    def kind(self, name: str) -> str:
        return self.content.tensors[self.names[name]].type_name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.content.tensors[self.names[name]].shape

    def read(self, name: str, config: ModelConfig) -> Tensor:
        """Float32, rows in the order of this library."""
        dense = self.content.read(self.names[name])
        heads = {"wq": config.n_heads, "wk": config.kv_heads}.get(name.rpartition(".")[2])
        if heads and self.get("general.architecture") == "llama":
            dense = np.ascontiguousarray(separate_rows(dense, heads))
        return torch.from_numpy(dense)


def _weights(model: Transformer) -> dict[str, nn.Module]:
    """The modules that a file has a weight for, by our names."""
    kinds = (nn.Linear, nn.Embedding, RMSNorm, PackedLinear)
    found: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    if model.config.tie_embeddings:
        del found["lm_head"]
    return found


def _check(config: ModelConfig, reader: _Reader) -> None:
    """Refuse a file that lacks a tensor or has one of another shape, before memory is taken for any."""
    file = reader.file
    if config.n_layers > len(reader.names):
        raise UserError(f"{file}: {config.n_layers} blocks in its keys, and only {len(reader.names)} tensors.")
    with without_memory():
        skeleton = Transformer(config)
    for name, module in _weights(skeleton).items():
        wanted = tuple(cast(Tensor, module.weight).shape)
        if name not in reader.names:
            raise UserError(f"{file}: has no {GGUF.theirs(name)}.weight.")
        if (there := reader.shape(name)) != wanted:
            raise UserError(f"{file}: {GGUF.theirs(name)}.weight is {there}, and its keys say {wanted}.")


def read_gguf(file: Path) -> Opened:
    """The model of a GGUF file. Raises ``UserError`` for what this library cannot compute or read."""
    try:
        return _read(file)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A key of another type than usual comes out in many ways.
        raise UserError(f"{file}: damaged ({type(error).__name__}: {str(error)[:100]}).") from error


def _read(file: Path) -> Opened:
    reader = _Reader(file)
    config = _config(reader.get, "lm_head" not in reader.names, file)
    _check(config, reader)
    kinds = collections.Counter(reader.kind(n) for n in reader.names if ".attention.w" in n or ".feed_forward.w" in n)
    ternary = set(kinds) <= set(TERNARY)
    model = _packed(config, reader) if ternary else _float(config, reader)
    prefix, fields = "tokenizer.ggml.", reader.content.fields
    vocabulary = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    tokenizer, eos = read_tokenizer(vocabulary, file)
    listed = ", ".join(f"{kind} ({count} matrices)" for kind, count in kinds.most_common())
    return Opened(
        model=model,
        tokenizer=tokenizer,
        recipe={
            "name": "BitNet",
            "weight": "ternary" if ternary else "none",
            "act_bits": 8 if ternary else "none",
        },
        chat_template=reader.get("tokenizer.chat_template"),
        eos_token=eos,
        origin={"file": file.name, "kind": "GGUF", "name": reader.get("general.name"), "types": listed},
    )


def _float(config: ModelConfig, reader: _Reader) -> Transformer:
    with without_memory():
        names = _weights(Transformer(config))
    return float_model(config, {f"{name}.weight": reader.read(name, config) for name in names})


def _packed(config: ModelConfig, reader: _Reader) -> PackedTransformer:
    with without_memory():
        names = [n for n, m in Transformer(config).named_modules() if type(m) is nn.Linear and n != "lm_head"]
    model = packed_skeleton(config, dict.fromkeys(names, LayerForm("ternary2")), "float32")
    place(model)
    for name, module in _weights(model).items():
        dense = reader.read(name, config)
        if not isinstance(module, PackedLinear):
            cast(Tensor, module.weight).detach().copy_(dense)
            continue
        found = _ternary(dense)
        if found is None:
            raise UserError(f"{reader.file}: {GGUF.theirs(name)} has more than one scale; such files are not read.")
        module.packed.copy_(FORMATS[module.format].pack(found[0]))
        assert module.inv_scale is not None
        module.inv_scale.copy_(found[1])
    return model.join_blocks()
