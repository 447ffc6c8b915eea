"""F8: what is exported is what others read."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from bitnet.interchange.check import bound_of_gguf, bound_of_hf, check_gguf, check_hf
from bitnet.interchange.gguf_blocks import separate_rows
from bitnet.interchange.names import GGUF
from bitnet.interchange.opened import Opened
from bitnet.interchange.parts import matrices
from tests.interchange.conftest import opened_model
from tests.interchange.test_gguf import written as written_gguf
from tests.interchange.test_hf_export import written as written_hf

MODELS = (
    {"seed": 0},
    {"seed": 1, "sub_norm": False},
    {"seed": 2, "weight": "binary", "sub_norm": False, "n_kv_heads": 4},
    {"seed": 3, "sub_norm": False, "tie_embeddings": False, "n_kv_heads": 1},
    {"seed": 4, "n_layers": 1, "rope_theta": 300_000.0, "ffn_dim": 512},
)
CHECKED = 64
HUGGING_FACE = {
    "tok_embeddings": "embed_tokens", "norm": "norm",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm",
}  # fmt: skip
"""What transformers calls our modules."""


def equal_in_gguf(opened: Opened, file: Path) -> bool:
    """Whether the gguf package finds every matrix: its levels times the scale, in float16, that is served."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    config = opened.model.config
    for matrix in matrices(opened.model):
        tensor = tensors[f"{GGUF.theirs(matrix.name)}.weight"]
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"wq": config.n_heads, "wk": config.kv_heads}.get(matrix.name.rpartition(".")[2])
        if heads and not config.sub_norm:
            dense = separate_rows(dense, heads)
        scale = np.float32(np.float16(1.0 / matrix.inv_scale.item()))
        if not np.array_equal(dense, matrix.levels.numpy().astype(np.float32) * scale):
            return False
    return True


def equal_in_safetensors(opened: Opened, folder: Path) -> bool:
    """Whether numpy finds every parameter: a byte holds one level of each quarter of the rows, the low bits first."""
    found = load_file(folder / "model.safetensors")
    for name, parameter in opened.model.named_parameters():
        path, part = re.fullmatch(r"(layers\.\d+\.|)(?:attention\.|feed_forward\.|)(\w+)\.weight", name).groups()
        theirs = f"model.{path}{HUGGING_FACE[part]}" if part != "lm_head" else part
        stored, weight = found.pop(f"{theirs}.weight").numpy(), parameter.double().numpy()
        if stored.dtype == np.uint8:
            stored = np.concatenate([(stored >> shift) & 3 for shift in (0, 2, 4, 6)]).astype(int) - 1
            scale = np.abs(weight).mean()
            if not np.isclose(found.pop(f"{theirs}.weight_scale").item() * scale, 1.0, rtol=1e-6):
                return False
            binary = opened.recipe["weight"] == "binary"
            weight = np.where(weight > weight.mean(), 1, -1) if binary else np.rint(weight / scale).clip(-1, 1)
        if not np.array_equal(stored, weight):
            return False
    return not found


@pytest.mark.slow
@pytest.mark.check("F8", "exports are read by transformers, gguf and llama.cpp with our tensors and logits", 20)
def test_exports(tmp_path, tally) -> None:
    for number, options in enumerate(MODELS):
        opened = opened_model(**options)
        folder = written_hf(opened, tmp_path / f"hf{number}")
        file = written_gguf(opened, tmp_path / f"{number}.gguf", "tq2_0")
        tally(equal_in_safetensors(opened, folder), f"{options}: tensors in safetensors")
        tally(equal_in_gguf(opened, file), f"{options}: tensors in GGUF")
        report = check_hf(opened, folder, bound_of_hf("bitlinear", "float32"), CHECKED)
        equal = report.comparison is not None and report.comparison.difference == 0
        tally(equal and not report.problems, f"{options}: transformers, {report.problems}")
        # The same weights in float32: llama.cpp's own ternary products round activations in another way.
        report = check_gguf(opened, written_gguf(opened, file, "f32"), bound_of_gguf("f32"), CHECKED)
        tally(report.comparison is not None and not report.problems, f"{options}: llama.cpp, {report.problems}")
