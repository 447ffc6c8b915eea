"""The model card of an exported folder, from what the run left behind: data, loss curve, figures, how to load."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from bitnet.estimate import count_parameters
from bitnet.interchange.check import Report
from bitnet.interchange.opened import Opened
from bitnet.layers import quantized_layers

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

{what}

## Load

{load}
"""

LOAD = """```python
import os
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # before torch: else transformers compiles its quantizers for about a minute

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")  # do not pass another dtype: the file says the right one
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

Needs `transformers` (4.57 or 5) and `accelerate`."""

FORM_REMARKS = {
    "bitlinear": "2 bits a weight on disk and in memory; transformers unpacks them at every forward.",
    "autobitlinear": "2 bits a weight on disk; transformers unpacks them to floats once, on loading.",
    "online": "latent float weights that transformers makes ternary in every forward; they can be trained on.",
    "compressed-tensors": "the integers, for transformers and vLLM; reading them needs the package compressed-tensors.",
    "dense": "plain float weights.",
}


def _facts_of_run(source: Path) -> dict[str, Any]:
    file, settings = source / "summary.json", source / "config.yaml"
    if not file.is_file() or not settings.is_file():
        return {}
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = yaml.safe_load(settings.read_text(encoding="utf-8"))
        return facts | {"seed": config["seed_everything"], "parent": config["model"]["init_from"]}
    except (LookupError, TypeError, ValueError, yaml.YAMLError):  # a file that was cut off: the card says less
        return {}


def _training(facts: dict[str, Any]) -> list[str]:
    data, figures = facts["data"], facts["figures"]
    tokens = sum(part["tokens"] for part in data["train"])
    nbytes = sum(part["text_bytes"] for part in data["train"])
    names = ", ".join(f"`{Path(path).name}`" for path in data["paths"])
    rows = [
        ("data", f"{names}: {nbytes:,} bytes, {tokens:,} tokens; sha256 {', '.join(h[:12] for h in data['sha256'])}"),
        ("steps", f"{facts['steps']:,} in {facts['seconds']:,.0f} s"),
        ("begun with", f"`{facts['parent']}`" if facts["parent"] else "random weights"),
        ("seed", f"{facts['seed']}"),
    ]
    if "val/loss" in figures:
        loss = f"{figures['val/loss']:.4f} nats per token, {figures['val/bpb']:.4f} bits per byte"
        rows.append(("validation", loss))
    if "quant/zero_fraction" in figures:
        rows.append(("zeros", f"{figures['quant/zero_fraction']:.1%} of the ternary weights"))
    return ["## Training", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def write_card(folder: Path, opened: Opened, *, name: str, source: Path, form: str, dtype: str, report: Report) -> None:
    """Write ``README.md`` into ``folder``, and the loss curve of the run ``source`` if there is one.

    ``name`` is what a reader passes to ``from_pretrained``.
    """
    config, recipe = opened.model.config, opened.recipe
    counts = count_parameters(config)
    weight, act_bits = recipe.get("weight", "none"), recipe.get("act_bits", "none")
    low_bit = weight != "none"
    kind = "float weights"
    if low_bit:
        kind = f"{weight} weights ({'1.58 bits' if weight == 'ternary' else '1 bit'})"
    elif "bits" in recipe:
        kind = f"{recipe['bits']}-bit weights ({recipe['name']})"
    activations = f" and {act_bits}-bit activations" if act_bits != "none" else ""
    remark = FORM_REMARKS[form]
    on_grid = quantized_layers(opened.model).values()
    if form == "dense" and (act_bits != "none" or any(layer.act is not None for layer in on_grid)):
        remark += " Activations are not quantized in this form: logits differ slightly from training."
    what = (
        f"A language model of {counts.total:,} parameters with {kind}{activations}: {config.n_layers} layers, width "
        f"{config.dim}, vocabulary {config.vocab_size:,}, context {config.max_seq_len:,} tokens. "
        f"`{form}` form, {dtype}: {remark}"
    )
    tags = (
        ["bitnet", "1.58-bit" if weight == "ternary" else "1-bit"]
        if low_bit
        else ["bitnet" if config.sub_norm else "llama"]
    )
    if form == "compressed-tensors":
        tags.append(form)
    text = HEADER.format(
        name=name.rpartition("/")[2],
        what=what,
        tags="\n".join(f"- {tag}" for tag in tags),
        load=LOAD.format(name=name, prompt="The"),
    )
    lines = [text]
    if facts := _facts_of_run(source):
        lines += [*_training(facts), ""]
        if (source / "loss.png").is_file():
            shutil.copyfile(source / "loss.png", folder / "loss.png")
            lines += ["![Bits per byte over the run](loss.png)", ""]
    if opened.origin:
        listed = "; ".join(f"{key}: {value}" for key, value in opened.origin.items())
        made = "Quantized from another model." if "parent" in opened.origin else "Imported, not trained here."
        lines += ["## Origin", "", f"{made} {listed}.", ""]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines += [
        "## Size and check",
        "",
        f"model.safetensors has {stored:,} bytes, {8 * stored / counts.total:.2f} bits per parameter.",
        "",
        *("    " + line for line in report.lines()),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
