"""Adapters in peft's layout, beside the low-bit base that they belong to, as a dense Hugging Face folder.

    OUT/adapter_model.safetensors    base_model.model.<their name>.lora_A.weight (R, K), .lora_B.weight (N, R)
    OUT/adapter_config.json          LORA with rank, lora_alpha and the names of the linears
    OUT/base/                        the base, each matrix as what its integers stand for

peft computes ``W x + (lora_alpha / r) B A x``, as we do.
"""

import json
from pathlib import Path

from torch import Tensor

from bitnet.errors import UserError
from bitnet.interchange.hf_export import write_hf
from bitnet.interchange.names import HUGGING_FACE
from bitnet.interchange.opened import Opened
from bitnet.interchange.parts import float_state
from bitnet.layers import LoRALinear
from bitnet.model import Transformer, float_model
from bitnet.tensor_file import layout, write


def adapters(model: Transformer) -> dict[str, LoRALinear]:
    """Layers with an adapter that peft can hold, by name. Raises ``UserError`` for a model without."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear) and m.lora_a is not None}
    if not found:
        raise UserError(
            "--format peft: this model has no adapters (those of QA-LoRA are in its zero points already); "
            "use --format hf --form dense."
        )
    return found


def without_adapters(model: Transformer) -> Transformer:
    """The float model that multiplies by what the integers alone stand for."""

    def base(name: str, whole: Tensor) -> Tensor:
        layer = model.get_submodule(name)
        return layer.dense().detach() if isinstance(layer, LoRALinear) else whole

    return float_model(model.config, float_state(model, lambda m: base(m.name, m.dense())))


def write_peft(folder: Path, opened: Opened, base_name: str) -> None:
    """Write all files into ``folder``, which exists. ``base_name`` is what peft is told that the base is called."""
    layers = adapters(opened.model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.lora_a is not None and layer.lora_b is not None
        theirs = f"base_model.model.{HUGGING_FACE.theirs(name)}"
        tensors[f"{theirs}.lora_A.weight"] = layer.lora_a.detach()
        tensors[f"{theirs}.lora_B.weight"] = layer.lora_b.detach()
    header, order = layout(tensors, {"format": "pt"})
    write(folder / "adapter_model.safetensors", header, (tensors[name] for name in order))
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({HUGGING_FACE.theirs(name).rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "base").mkdir()
    write_hf(
        folder / "base",
        without_adapters(opened.model),
        opened.tokenizer,
        form="dense",
        dtype="float32",
        eos_id=opened.eos_id,
        chat_template=opened.chat_template,
    )
