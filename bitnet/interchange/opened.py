"""A model with all that belongs to it, from a run, checkpoint, packed file, Hugging Face folder or GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet.checkpoint import EXTRAS, model_of, read_checkpoint
from bitnet.config import ModelConfig
from bitnet.data.tokenizer import find_eos
from bitnet.errors import UserError
from bitnet.inference.files import load_packed, packed_file
from bitnet.inference.header import read_header
from bitnet.model import Transformer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model in eval mode, its tokenizer, and what neither of them knows."""

    model: Transformer
    tokenizer: Tokenizer
    recipe: dict[str, Any] = field(default_factory=dict)
    """``name`` and options of the recipe that it was trained with."""
    chat_template: str | None = None
    """Jinja text that turns messages into a prompt."""
    eos_token: str | None = None
    """Token that ends a text; if not given, the usual ones are looked for."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, when they were not trained here: for people, and for the model card."""

    @property
    def eos_id(self) -> int:
        return find_eos(self.tokenizer, self.eos_token)

    def extras(self) -> dict[str, Any]:
        """What goes into a checkpoint or packed file beside model, recipe and tokenizer."""
        return {name: value for name in EXTRAS if (value := getattr(self, name))}


def config_of(file: Path, **fields: Any) -> ModelConfig:
    """A ``ModelConfig`` whose refusals name the file that the values are from."""
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _facts(description: dict[str, Any]) -> dict[str, Any]:
    """What checkpoints and packed files say beside model and tokenizer."""
    return {name: description[name] for name in ("recipe", *EXTRAS) if description.get(name)}


def open_model(path: str | Path, device: torch.device | str = "cpu") -> Opened:
    """Open anything that holds a model. Raises ``UserError`` for what does not."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint, packed model, Hugging Face folder or GGUF file.")
    if path.name == "config.json":
        path = path.parent
    if packed := packed_file(path):
        model, tokenizer = load_packed(packed, device)
        return Opened(model=model, tokenizer=tokenizer, **_facts(read_header(packed).description))
    if opened := read_foreign(path):
        opened.model.float().to(device)  # the forward is in float32, whatever the file is in
        return opened
    content = read_checkpoint(path)
    plain, tokenizer = model_of(content, path, device)
    return Opened(model=plain, tokenizer=tokenizer, **_facts(content["bitnet"]))


def read_foreign(path: Path) -> Opened | None:
    """The model of a GGUF file or Hugging Face folder in the dtype of the file; ``None`` for anything else."""
    if path.suffix == ".gguf":
        from bitnet.interchange.gguf_import import read_gguf

        return read_gguf(path)
    if (path / "config.json").is_file():
        from bitnet.interchange.hf_import import read_hf

        return read_hf(path)
    return None
