"""A GGUF file of a model, written with the gguf package (and ``gguf_blocks`` for the types that it lacks).

Which graph a program computes is decided by ``general.architecture`` alone, so a wrong one loads and is silently wrong:

==================  ============  ==============================================================================
model               architecture  read by
==================  ============  ==============================================================================
no sub-norms, silu  llama         llama.cpp and all that embeds it, ik_llama.cpp, bitnet.cpp
sub-norms, silu     bitnet        llama.cpp and all that embeds it; head tied to the embedding
sub-norms, relu2    bitnet-b1.58  ik_llama.cpp, bitnet.cpp; llama.cpp would compute silu, so its types are refused
no sub-norms, relu2  none          nobody
==================  ============  ==============================================================================

The int8 activations of these programs are rounded in blocks of a row, not over a whole token, so their logits are close
to ours and never equal; ``check`` has the bounds.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.interchange.gguf_blocks import BLOCK, FILE_TYPE, OWN_WRITERS, OwnType, interleave_rows
from bitnet.interchange.gguf_file import gguf_package
from bitnet.interchange.gguf_tokenizer import add_tokenizer
from bitnet.interchange.names import GGUF
from bitnet.interchange.parts import Matrix, forms, matrices, tables, vectors
from bitnet.model import Transformer

LLAMA_CPP_ONLY = ("tq2_0", "tq1_0", "q2_0")


def architecture(config: ModelConfig, kind: str) -> str:
    """``general.architecture`` of a model written as ``kind``. Raises ``UserError`` where no program is right."""
    relu2 = config.activation == "relu2"
    if relu2 and not config.sub_norm:
        raise UserError("a model with relu2 and without sub-norms: no GGUF program has this graph; use --format hf.")
    if relu2 and kind in LLAMA_CPP_ONLY:
        raise UserError(
            f"--type {kind}: llama.cpp would load a relu2 model and compute silu, silently wrong. ik_llama.cpp and "
            "bitnet.cpp have this graph: use --type i2_s or f32."
        )
    if config.sub_norm and not config.tie_embeddings:
        raise UserError(
            "sub-norms with an untied head: llama.cpp's bitnet graph multiplies by the embedding; tie them."
        )
    if not config.sub_norm:
        return "llama"
    return "bitnet-b1.58" if relu2 else "bitnet"


def check_type(model: Transformer, kind: str) -> None:
    """Raise ``UserError`` when ``kind`` cannot hold this model, before anything is written."""
    architecture(model.config, kind)
    if kind not in BLOCK:
        return
    weight, _ = forms(model)
    if weight == "none":
        raise UserError(f"--type {kind} holds ternary weights, and this model has float ones; use --type f16 or f32.")
    widths = {"dim": model.config.dim, "ffn_dim": model.config.ffn_dim}
    for name, value in widths.items():
        if value % BLOCK[kind]:
            raise UserError(
                f"--type {kind}: {name} = {value} is not a multiple of {BLOCK[kind]}; use --type f16 or f32."
            )


def _add_matrix(writer: Any, matrix: Matrix, kind: str, interleaved_heads: int) -> None:
    gguf = gguf_package()
    name = f"{GGUF.theirs(matrix.name)}.weight"

    def rows(w: Any) -> Any:
        return interleave_rows(w, interleaved_heads) if interleaved_heads else w

    if kind in OWN_WRITERS:
        assert matrix.levels is not None and matrix.inv_scale is not None
        levels = rows(matrix.levels.numpy())
        data = OWN_WRITERS[kind](levels, 1 / float(matrix.inv_scale))
        writer.add_tensor_info(name, levels.shape, np.dtype(np.int8), data.nbytes, raw_dtype=OwnType[kind.upper()])
        writer.tensors[-1][name].tensor = data
        return
    dense = rows(matrix.dense().numpy())
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, gguf.quants.quantize(dense, type_), raw_dtype=type_)


def write_gguf(
    file: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    kind: str,
    name: str,
    eos_id: int,
    chat_template: str | None = None,
) -> None:
    """Write ``file``. ``kind`` has passed ``check_type``; embedding and head are float16 (f32: float32)."""
    gguf = gguf_package()
    config = model.config
    arch = architecture(config, kind)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPE[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer, tokenizer, config.vocab_size, eos_id, chat_template)
    wide = gguf.GGMLQuantizationType.F32 if kind == "f32" else gguf.GGMLQuantizationType.F16
    for table, weight in tables(model).items():
        data = gguf.quants.quantize(weight.float().numpy(), wide)
        writer.add_tensor(f"{GGUF.theirs(table)}.weight", data, raw_dtype=wide)
    for norm, weight in vectors(model):
        writer.add_tensor(f"{GGUF.theirs(norm)}.weight", weight.float().numpy())
    for matrix in matrices(model):
        heads = {"wq": config.n_heads, "wk": config.kv_heads}.get(matrix.name.rpartition(".")[2], 0)
        _add_matrix(writer, matrix, kind, heads if arch == "llama" else 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
