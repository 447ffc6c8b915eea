"""Results of post-training recipes in transformers (compressed-tensors) and peft, against the logits of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.checkpoint import recipe_options
from bitnet.errors import UserError
from bitnet.interchange import integer_layout
from bitnet.interchange.check import OTHER_ACTIVATIONS, SAME_WEIGHTS, check_hf
from bitnet.interchange.hf_export import check_form, write_hf
from bitnet.interchange.integer_layout import pack_bits
from bitnet.interchange.opened import Opened
from bitnet.interchange.peft_export import adapters, without_adapters, write_peft
from bitnet.layers import quantized_layers
from bitnet.recipes import LLMQAT, RTN, LLMInt8, LoftQ, QALoRA, QLoRA, Recipe, SmoothQuant, SpQR
from bitnet.tensor_file import TensorFile

from .conftest import opened_model


def quantized(recipe: Recipe, **sizes: Any) -> Opened:
    opened = opened_model(weight="none", act_bits="none", **sizes)
    data = [torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(s)) for s in range(4)]
    recipe.prepare(opened.model, data if recipe.needs_text else [])
    for name, parameter in opened.model.named_parameters():
        if name.endswith("lora_b"):  # as if it had been trained
            parameter.data += 0.02 * torch.randn_like(parameter)
    recipe.finalize(opened.model)
    opened.model.requires_grad_(False).eval()
    return Opened(model=opened.model, tokenizer=opened.tokenizer, recipe=recipe_options(recipe))


def written(opened: Opened, folder: Path, form: str = "compressed-tensors") -> Path:
    folder.mkdir()
    write_hf(
        folder, opened.model, opened.tokenizer, form=check_form(opened.model, form, "float32"), dtype="float32",
        eos_id=opened.eos_id, chat_template=None,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "recipe",
    [
        RTN(bits=3, symmetric=True),
        RTN(bits=2),
        pytest.param(RTN(bits=4, symmetric=True), marks=pytest.mark.slow),
        pytest.param(RTN(bits=8, group_size=0, symmetric=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_alone_give_the_same_logits(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    opened = quantized(recipe)
    report = check_hf(opened, written(opened, tmp_path / "m"), SAME_WEIGHTS, 64)
    assert report.comparison is not None and report.problems == [], report.lines()


@pytest.mark.parametrize(
    "recipe",
    [RTN(bits=8, group_size=0, symmetric=True, activation_bits=8), SmoothQuant(level="o3"),
     pytest.param(SmoothQuant(weight_scale="channel"), marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_integer_activations_are_near(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    opened = quantized(recipe)
    report = check_hf(opened, written(opened, tmp_path / "m"), OTHER_ACTIVATIONS, 64)
    assert report.comparison is not None and report.problems == [], report.lines()


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_are_those_of_the_library(bits: int, tmp_path: Path) -> None:
    """Packed by the library itself from the same integers, and unpacked by it."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(1 << bits, (6, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    signed = (codes.int() - (1 << bits - 1)).to(torch.int8)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, helpers.pack_to_int32(signed, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, torch.Size([6, 100])), signed)


def test_what_the_folder_says(tmp_path: Path) -> None:
    folder = written(quantized(RTN(bits=4, group_size=32, symmetric=True)), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors", "pack-quantized", ["lm_head"],
    )  # fmt: skip
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    entries = TensorFile(folder / "model.safetensors").entries
    prefix = "model.layers.0.mlp.down_proj."
    shapes = {n.removeprefix(prefix): e.shape for n, e in entries.items() if n.startswith(prefix)}
    assert shapes == {"weight_packed": (256, 32), "weight_scale": (256, 8), "weight_shape": (2,)}


def test_a_wrong_zero_point_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    opened = quantized(RTN(bits=4))
    folder = written(opened, tmp_path / "m")
    layer = opened.model.layers[0].attention.wq
    layer.zero_point.data += 1
    layer._for_kernel = None
    assert check_hf(opened, folder, SAME_WEIGHTS, 64).problems


@pytest.mark.parametrize(
    "recipe,named",
    [
        (SpQR(bits=3), "floating point"),
        (LLMInt8(), "floating point"),
        (QLoRA(rank=4), "NormalFloat"),
        (LLMQAT(), "quantizes its output"),
        (QALoRA(rank=4), "adapter"),
        (SmoothQuant(level="o2"), "one activation scale a call"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_the_layout_cannot_hold_is_refused(recipe: Recipe, named: str) -> None:
    opened = quantized(recipe)
    with pytest.raises(UserError, match=named):
        check_form(opened.model, "compressed-tensors", "float32")
    assert integer_layout.obstacle(opened_model().model) is not None
    with pytest.raises(UserError, match="post-training recipe"):
        check_form(opened.model, "bitlinear", "float32")


@pytest.mark.parametrize(
    "recipe",
    [
        LoftQ(quantizer="uniform", bits=2, rank=4),
        pytest.param(QLoRA(rank=4, alpha=8.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_adapters_in_peft(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    opened = quantized(recipe)
    folder = tmp_path / "m"
    folder.mkdir()
    write_peft(folder, opened, "m/base")
    report = check_hf(opened, folder, SAME_WEIGHTS, 64)
    assert report.comparison is not None and report.problems == [], report.lines()
    base = without_adapters(opened.model)
    ids = torch.arange(20).unsqueeze(0)
    assert not torch.allclose(base(ids), opened.model(ids), atol=1e-3)  # the adapters do something


def test_models_without_adapters_are_refused() -> None:
    for recipe in (RTN(), QALoRA(rank=4)):
        with pytest.raises(UserError, match="no adapters"):
            adapters(quantized(recipe).model)


def test_dense_export_is_what_the_integers_stand_for(tmp_path: Path) -> None:
    opened = quantized(LoftQ(bits=2, rank=4))
    folder = written(opened, tmp_path / "m", "dense")
    file = TensorFile(folder / "model.safetensors")
    for name, theirs in (("layers.1.feed_forward.w2", "model.layers.1.mlp.down_proj.weight"),):
        layer: Any = quantized_layers(opened.model)[name]
        assert torch.equal(file.read(theirs), layer.dense() + layer.lora_b @ layer.lora_a)
