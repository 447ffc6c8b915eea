"""From a run folder to a model that answers: read without Lightning, without running code from the file.

A checkpoint is a file of tensors and plain values (``torch.load(weights_only=True)``). Under the key ``bitnet`` it
holds what is needed to build the model again: format version, model config, recipe and the tokenizer's JSON text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitnet.checkpoint_zip import check_checkpoint_file
from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.model import Transformer, without_memory
from bitnet.recipes import RECIPES, Recipe
from bitnet.sharded_checkpoint import damage_of_parts, is_sharded, read_sharded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT_VERSION = 1
MODEL_PREFIX = "model."


EXTRAS = ("chat_template", "eos_token", "origin")
"""Optional entries: Jinja text that makes a prompt of messages, the token that ends a text, and where imported weights
come from. Packed files have them as well."""


def describe(
    config: ModelConfig, recipe: Recipe, tokenizer_json: str, extras: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The ``bitnet`` entry of a checkpoint: plain values only. ``extras`` are those of ``EXTRAS``."""
    return {
        **(extras or {}),
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "recipe": recipe_options(recipe),
        "tokenizer": tokenizer_json,
    }


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """``name`` and settings of a recipe as plain values; what it has found or holds meanwhile is left out."""
    assert dataclasses.is_dataclass(recipe)
    settings = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.init}
    return {"name": type(recipe).__name__, **settings}


def is_float(description: dict[str, Any]) -> bool:
    """Whether a checkpoint or packed file holds a model without low bits."""
    recipe = description.get("recipe") or {"name": "BitNet", "weight": "none", "act_bits": "none"}
    return bool(recipe["name"] == "BitNet" and recipe.get("weight") == recipe.get("act_bits") == "none")


def write_run(
    folder: Path, description: dict[str, Any], state: dict[str, torch.Tensor], origin: dict[str, Any]
) -> None:
    """Make what ``load_checkpoint`` reads in an existing folder, for a model that no ``fit`` has trained.

    ``description`` is that of ``describe``; ``state`` the state dict of the transformer.
    """
    content = {
        "bitnet": description,
        "state_dict": {MODEL_PREFIX + name: tensor for name, tensor in state.items()},
        "global_step": 0,
    }
    (folder / "checkpoints").mkdir()
    with (folder / "checkpoints" / "last.ckpt").open("wb") as file:  # by its name torch would not say what is wrong
        torch.save(content, file)
    (folder / "tokenizer.json").write_text(description["tokenizer"], encoding="utf-8")
    (folder / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def find_checkpoint(path: str | Path) -> Path:
    """The .ckpt file (or sharded folder) meant by ``path``: itself, or ``checkpoints/last.ckpt`` of a run folder."""
    path = Path(path)
    if path.is_file() or is_sharded(path):
        return path
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint.")
    file = path / "checkpoints" / "last.ckpt"
    if not (file.is_file() or is_sharded(file)):
        raise UserError(f"{path}: holds no checkpoints/last.ckpt; is it the folder of a run that has saved?")
    return file


def damage(file: Path) -> str:
    """What is wrong with the bytes of a checkpoint file, or an empty string.

    ``torch.save`` writes a zip file, which has a checksum of every entry: tensors, and the pickle that names them.
    ``torch.load`` does not look at the checksums, but they find every changed bit, and 2^-32 of larger damage passes.
    What lies outside of the entries cannot change a value: ``torch.load`` finds its way, or fails.
    """
    if file.is_dir():
        return damage_of_parts(file)
    try:
        check_checkpoint_file(file)
    except UserError as error:
        return str(error).removeprefix(f"{file}: ").rstrip(".")
    try:
        with zipfile.ZipFile(file) as entries:
            if bad := entries.testzip():
                return f"the checksum of {bad} is wrong"
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return ""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU; of a sharded one all but the optimizer.

    Raises ``UserError`` when it is damaged or not one of ours.
    """
    file = find_checkpoint(path)
    sharded = is_sharded(file)
    if not sharded:
        check_checkpoint_file(file)
    if why := damage(file):
        raise UserError(f"{file}: not a readable checkpoint ({why}).")
    try:
        content = read_sharded(file) if sharded else torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file}: not a readable checkpoint ({reason[:120]}).") from error
    if not isinstance(content, dict) or "bitnet" not in content or "state_dict" not in content:
        raise UserError(f"{file}: not a checkpoint of this library (it has no 'bitnet' entry).")
    if not isinstance(content["bitnet"], dict) or not isinstance(content["state_dict"], dict):
        raise UserError(f"{file}: not a checkpoint of this library (its entries are of other kinds).")
    for name, tensor in content["state_dict"].items():
        if not isinstance(tensor, torch.Tensor) or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: {name} is no tensor, or claims more values than the file holds.")
    version = content["bitnet"].get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: checkpoint format {version}; this version reads {FORMAT_VERSION}.")
    return content


def build(description: dict[str, Any]) -> tuple[ModelConfig, Recipe]:
    """Config and recipe from the ``bitnet`` entry of a checkpoint."""
    config = ModelConfig(**description["config"])
    options = dict(description["recipe"])
    name = options.pop("name")
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} of the checkpoint is unknown here; known: {', '.join(sorted(RECIPES))}.")
    kind = RECIPES[name]
    for key, value in options.items():
        options[key] = tuple(value) if isinstance(value, list) else value
    try:
        return config, kind(**options)
    except TypeError as error:
        raise UserError(
            f"the checkpoint's recipe {name} has settings that this version does not know ({error})."
        ) from error


FREE_TO_CHANGE = ("dropout", "init_std", "max_seq_len")
"""Fields of the model config that may differ from the checkpoint's: no tensor depends on them."""


def check_fits(description: dict[str, Any], config: ModelConfig, tokenizer_json: str, where: str) -> None:
    """Refuse to load a checkpoint into another model or under another tokenizer; ``where`` names it in the message."""
    old, _ = build(description)
    differing = [
        f"model.config.{field.name} is {getattr(old, field.name)} there and {getattr(config, field.name)} here"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in FREE_TO_CHANGE and getattr(old, field.name) != getattr(config, field.name)
    ]
    if _same_tokens(description["tokenizer"]) != _same_tokens(tokenizer_json):
        there, here = (_name_of_tokens(text) for text in (description["tokenizer"], tokenizer_json))
        raise UserError(
            f"{where}: trained with another tokenizer ({there} there, {here} here); use the same data, "
            "or set data.tokenizer to that run's tokenizer.json."
        )
    if differing:
        raise UserError(f"{where}: another model ({'; '.join(differing)}).")


def _same_tokens(tokenizer_json: str) -> dict[str, Any]:
    """What decides the ids of a text; tokens that are put around it are left out, since training adds none."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    return {key: value for key, value in content.items() if key not in ("post_processor", "truncation", "padding")}


def _name_of_tokens(tokenizer_json: str) -> str:
    """Size and digest of a tokenizer, for messages."""
    content = _same_tokens(tokenizer_json)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{len(content.get('model', {}).get('vocab', ()))} tokens, sha256 {digest[:12]}"


def model_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the model, under the names that ``Transformer`` gives them."""
    return {
        key.removeprefix(MODEL_PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(MODEL_PREFIX)
    }


def without_factors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """``model_state`` with the trained factors of scales multiplied into the latent weights: as any recipe takes it."""
    state = model_state(content)
    for name in [name for name in state if name.endswith(".factor")]:
        factor, weight = state.pop(name).float(), f"{name.removesuffix('factor')}weight"
        groups = state[weight].float().view(*factor.shape, -1)  # (R, G, weights of a group)
        state[weight] = (groups * factor[..., None]).view(state[weight].shape)
    return state


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """``(model, tokenizer)`` of a run folder or .ckpt file, in eval mode.

    The forward pass of the model, (B, T) ids -> (B, T, vocab) logits, is the quantized one that was trained.
    """
    return model_of(read_checkpoint(path), path, device)


def model_of(
    content: dict[str, Any], path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """``load_checkpoint`` for what ``read_checkpoint`` gave; ``path`` is for messages."""
    from bitnet.data.tokenizer import parse_tokenizer

    try:
        config, recipe = build(content["bitnet"])
        tokenizer = parse_tokenizer(content["bitnet"]["tokenizer"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path}: its description of the model cannot be read ({reason}).") from error
    if config.n_layers > len(content["state_dict"]):
        raise UserError(f"{path}: n_layers = {config.n_layers}, and only {len(content['state_dict'])} tensors.")
    with without_memory():
        model = Transformer(config)
        recipe.prepare(model)
    load_state(model, model_state(content), str(path), assign=True)
    recipe.finalize(model)
    return model.to(device).eval(), tokenizer


def load_state(model: Transformer, state: dict[str, torch.Tensor], where: str, assign: bool = False) -> None:
    """Fill ``model`` with all tensors of ``state``; ``assign`` takes them as they are instead of copying.

    Imported weights keep the dtype of their file on disk; the model gets float32. Raises ``UserError`` for others.
    """
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:  # of a tensor with another shape
        raise UserError(f"{where}: tensors do not fit the model: {str(error).splitlines()[-1].strip()}") from error
    if model.config.tie_embeddings:
        model.lm_head.weight = model.tok_embeddings.weight
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise UserError(f"{where}: tensors do not fit the model: {', '.join([*missing, *unexpected][:4])}.")


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors: equal digests mean bit-equal weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
