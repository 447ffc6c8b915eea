"""A Hugging Face folder of a model: config.json, model.safetensors, tokenizer files, generation_config.json.

Forms of the low-bit layers, all of transformers' ``quant_method: bitnet`` but the last:

============== =========================== ============================================== ==========================
form           weight                      forward                                        against ours, float32
============== =========================== ============================================== ==========================
bitlinear      uint8, four trits a byte    int8 activations x trits, divided once         equal, bit for bit
autobitlinear  the same, unpacked on load  activations dequantized before the product     last bits: KL < 1e-4
online         latent float                as autobitlinear; trainable                    last bits: KL < 1e-4
dense          levels / inv_scale, float   no activation quantization; plain linears      equals ours without it
compressed-    integers of 2 to 8 bits     of post-training recipes, with or without      weights equal (see
tensors        in int32 words, or int8     integer activations                            integer_layout.py)
============== =========================== ============================================== ==========================

A model with sub-norms is a ``BitNetForCausalLM``, one without is a ``LlamaForCausalLM``; both take silu and relu2.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.data.tokenizer import begin_id
from bitnet.errors import UserError
from bitnet.interchange import integer_layout
from bitnet.interchange.names import HUGGING_FACE
from bitnet.interchange.parts import Matrix, forms, matrices, tables, vectors
from bitnet.layers import quantized_layers
from bitnet.model import Transformer
from bitnet.quantizers import quantize_ternary_absmean
from bitnet.tensor_file import layout, write

Form = Literal["bitlinear", "autobitlinear", "online", "dense", "compressed-tensors"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRITS = 4
"""Trits of a byte."""


def pack_rows(levels: Tensor) -> Tensor:
    """int8 (N, K) of -1, 0, 1 -> uint8 (N / 4, K): byte r holds rows r, r + N/4, r + N/2, r + 3N/4, low to high."""
    codes = (levels + 1).to(torch.uint8).view(TRITS, -1, levels.shape[1])
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of ``pack_rows``. Raises ``ValueError`` for the code 3, which is no trit."""
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    if bool((codes == 3).any()):
        raise ValueError("a code is 3, which is no trit")
    return codes.to(torch.int8) - 1


def check_form(model: Transformer, form: Form, dtype: str) -> Form:
    """The form to write: ``dense`` for a float model, else ``form``. Raises ``UserError`` where it cannot hold it."""
    if form == "dense":
        return form
    if form == "compressed-tensors":
        integer_layout.check(model)
        return form
    if quantized_layers(model):
        raise UserError(
            f"--form {form}: this model is of a post-training recipe; use --form compressed-tensors or dense."
        )
    weight, act_bits = forms(model)
    if weight == "none" and act_bits == "none":
        return "dense"
    if act_bits != 8 or weight == "none":
        raise UserError(
            f"--form {form}: transformers computes with ternary weights and 8-bit activations; this model has {weight} "
            f"weights and {act_bits} activation bits. Use --form dense, or evaluate it here."
        )
    if form == "online":
        if dtype != "float32":
            raise UserError(
                "--form online: rounding latent weights to bfloat16 moves trits; use float32, or bitlinear."
            )
        if weight != "ternary":
            raise UserError("--form online: transformers would make binary latent weights ternary; use bitlinear.")
        for matrix in matrices(model):
            if matrix.weight is None:
                raise UserError(
                    "--form online writes latent weights, and a packed model has none; export the run it is of."
                )
            assert matrix.levels is not None and matrix.inv_scale is not None
            levels, inv_scale = quantize_ternary_absmean(matrix.weight)
            if not (torch.equal(levels, matrix.levels.float()) and torch.equal(inv_scale, matrix.inv_scale.view(()))):
                raise UserError(
                    f"--form online: {matrix.name} has other scales than the mean magnitude, which transformers takes; "
                    "use bitlinear."
                )
    elif why := model.config.export_obstacles()["hf"]:
        raise UserError(f"--form {form}: {why}; use --form dense or --form online.")
    return form


def _tensors_of(matrix: Matrix, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    name = HUGGING_FACE.theirs(matrix.name)
    if matrix.levels is None or form == "dense":
        return {f"{name}.weight": matrix.dense().to(dtype)}
    if form == "online":
        assert matrix.weight is not None
        return {f"{name}.weight": matrix.weight.to(dtype)}
    assert matrix.inv_scale is not None
    scale = matrix.inv_scale if form == "bitlinear" else matrix.inv_scale.reciprocal()
    return {f"{name}.weight": pack_rows(matrix.levels), f"{name}.weight_scale": scale.to(dtype)}


def hf_tensors(model: Transformer, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that goes into model.safetensors."""
    tensors: dict[str, Tensor] = {}
    if form == "compressed-tensors":
        for name, layer in quantized_layers(model).items():
            tensors |= integer_layout.tensors_of(name, layer)
    else:
        for matrix in matrices(model):
            tensors |= _tensors_of(matrix, form, dtype)
    for source in (vectors(model), tables(model).items()):
        tensors |= {f"{HUGGING_FACE.theirs(name)}.weight": tensor.to(dtype) for name, tensor in source}
    return tensors


def hf_config(config: ModelConfig, form: Form, dtype: str, eos_id: int, bos_id: int) -> dict[str, Any]:
    """config.json, as transformers 4.57 and 5 read it."""
    architecture, model_type = ("BitNetForCausalLM", "bitnet") if config.sub_norm else ("LlamaForCausalLM", "llama")
    content: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # Version 5 reads rope_parameters, version 4 rope_theta; with neither, both take 500000 or 10000 silently.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "initializer_range": config.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        # The dtype of the file, under the names of both versions: only the low-bit layers would be cast to another.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if form not in ("dense", "compressed-tensors"):
        content["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if form == "bitlinear" else "autobitlinear",
            "quantization_mode": "online" if form == "online" else "offline",
            "modules_to_not_convert": None,  # null leaves the head alone; an empty list would convert it
        }
    return content


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig, eos_id: int, bos_id: int) -> dict[str, Any]:
    """tokenizer_config.json; its class is the one that both versions know."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "bos_token": tokenizer.id_to_token(bos_id),
        "eos_token": tokenizer.id_to_token(eos_id),
        "pad_token": tokenizer.id_to_token(eos_id),
        "clean_up_tokenization_spaces": False,
    }


def write_hf(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    form: Form,
    dtype: str,
    eos_id: int,
    chat_template: str | None,
) -> None:
    """Write the files of the model into ``folder``, which exists. ``form`` has passed ``check_form``."""
    bos_id = begin_id(tokenizer, eos_id)
    header, order = layout(tensors := hf_tensors(model, form, DTYPES[dtype]), {"format": "pt"})
    write(folder / "model.safetensors", header, (tensors[name] for name in order))
    config = hf_config(model.config, form, dtype, eos_id, bos_id)
    if form == "compressed-tensors":
        config["quantization_config"] = integer_layout.quantization_config(model)
    files = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
            "do_sample": True,
            "temperature": 0.8,
            "top_k": 50,
        },
        "tokenizer_config.json": tokenizer_config(tokenizer, model.config, eos_id, bos_id),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
