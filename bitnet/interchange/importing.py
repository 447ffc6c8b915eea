"""``bitnet import``: another program's model as a run folder, compared with that program before it gets its name.

Packed ternary weights stay packed (``packed.safetensors`` in the folder); everything else is a checkpoint.
"""

import json
from pathlib import Path

from bitnet.checkpoint import describe, write_run
from bitnet.errors import UserError
from bitnet.estimate import count_parameters
from bitnet.inference.files import PACKED_NAME, save_packed
from bitnet.inference.packed_model import PackedTransformer
from bitnet.interchange.check import (
    BLOCK_ACTIVATIONS,
    EXACT,
    LAST_BITS,
    OTHER_ACTIVATIONS,
    ROUNDED,
    Report,
    check_gguf,
    check_hf,
)
from bitnet.interchange.exporting import announce, named_when_proven
from bitnet.interchange.opened import Opened, read_foreign
from bitnet.interchange.parts import Matrix, float_state, forms
from bitnet.recipes import BitNet


def save_run(opened: Opened, folder: Path, trainable: bool) -> None:
    """Write a run folder: the model, tokenizer.json, and where it came from."""
    model = opened.model
    if isinstance(model, PackedTransformer):
        save_packed(model, opened.tokenizer, folder / PACKED_NAME, recipe=opened.recipe, extras=opened.extras())
    if trainable or not isinstance(model, PackedTransformer):
        options = {key: value for key, value in opened.recipe.items() if key != "name"}
        recipe = BitNet(**options)
        description = describe(model.config, recipe, opened.tokenizer.to_str(), opened.extras())
        write_run(folder, description, float_state(model, Matrix.latent), opened.origin)
        return
    opened.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "origin.json").write_text(json.dumps(opened.origin, indent=1) + "\n", encoding="utf-8")


def _check(opened: Opened, path: Path, tokens: int) -> Report:
    if path.suffix == ".gguf":
        # A quantized file is computed by llama.cpp with rounded activations, and by us from its dequantized weights.
        bound = BLOCK_ACTIVATIONS if forms(opened.model)[0] != "none" else OTHER_ACTIVATIONS
        return check_gguf(opened, path, bound, tokens)
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantization = content.get("quantization_config")
    if (content.get("dtype") or content.get("torch_dtype")) != "float32":
        bound = ROUNDED  # transformers computes in the dtype of the file
    else:
        is_exact = quantization is not None and quantization.get("linear_class", "bitlinear") == "bitlinear"
        bound = EXACT if is_exact else LAST_BITS
    return check_hf(opened, path, bound, tokens)


def import_model(path: Path, out: Path, *, trainable: bool, check_tokens: int) -> None:
    """Make the run folder ``out``. Raises ``UserError`` for what cannot be read, or computes something else here."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    opened = read_foreign(path)
    if opened is None:
        raise UserError(f"{path}: neither a GGUF file nor a Hugging Face folder with a config.json.")
    if trainable and not isinstance(opened.model, PackedTransformer):
        raise UserError("--trainable: these weights are not packed; they can be trained as they are.")
    with named_when_proven(out) as folder:
        folder.mkdir()
        save_run(opened, folder, trainable)
        counts = count_parameters(opened.model.config)
        weight, act_bits = forms(opened.model)
        kind = "float weights" if weight == "none" else f"{weight} weights, {act_bits}-bit activations"
        print(f"{out}: {counts.total:,} parameters, {kind}")
        for name, value in opened.origin.items():
            print(f"  {name}: {value}")
        opened.model.float()
        announce(_check(opened, path, check_tokens), out)
