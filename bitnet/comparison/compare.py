"""``bitnet compare``: models side by side, each as it is stored, on the same text, the same machine, the same accounts.

Quality is that of the stored form: a packed model is scored packed, a float one rounded to 16 bits. Bits count every
tensor of the file. The cost of a model is its own and that of the models it started from, apart.
"""

import dataclasses
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet.comparison.cost import Cost, cost_of
from bitnet.comparison.documents import Document, Scores, read_documents, score_documents
from bitnet.comparison.stored import Stored, measure_speed, store
from bitnet.data.corpora import Reading
from bitnet.errors import UserError
from bitnet.estimate import count_parameters
from bitnet.interchange.opened import Opened, open_model
from bitnet.layers import BitLinear
from bitnet_kernels.bench import describe_device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of one model."""

    name: str
    method: str
    parameters: int
    linear_parameters: int
    """Weights of the linears of the blocks."""
    bits_per_parameter: float
    file_bytes: int
    bits_per_byte: float
    interval: tuple[float, float]
    """Of the bits per byte, 95 %."""
    difference: tuple[float, float, float] | None
    """From the first model: bits per byte and their interval; ``None`` for the first itself."""
    perplexity: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    memory_mb: float
    """Peak of a serving process over what it takes after its imports."""
    own: Cost | None
    parents: Cost | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows, and what they were measured on."""

    rows: list[Row]
    text: str
    documents: int
    text_bytes: int
    device: str
    threads: int
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "torch": torch.__version__, "python": platform.python_version()}


def method_of(recipe: dict[str, Any]) -> str:
    """A recipe in a few characters: name, bits of weights and activations, group size."""
    name = recipe.get("name", "BitNet")
    if name in ("BitNet", "Distilled"):
        weight = {"ternary": "W1.58", "binary": "W1", "none": "float"}[recipe.get("weight", "none")]
        act = recipe.get("act_bits", "none")
        words = weight if weight == "float" and act == "none" else f"{weight}A{16 if act == 'none' else act}"
        return words if name == "BitNet" else f"distilled {words}"
    act = recipe.get("activation_bits", "none")
    group = f" g{recipe['group_size']}" if recipe.get("group_size") else ""
    level = f" {recipe['level'].upper()}" if "level" in recipe else ""
    return f"{name}{level} W{recipe['bits']}A{16 if act == 'none' else act}{group}"


def check_comparable(models: Sequence[tuple[str, Opened]]) -> None:
    """Raises ``UserError`` for different tokenizers, since perplexity needs one, and for what no file could hold."""
    for name, opened in models:
        layers = (layer for layer in opened.model.modules() if isinstance(layer, BitLinear))
        if any(layer.weight_kind == "none" for layer in layers):
            raise UserError(f"{name}: has float weights with quantized activations, which are stored in no form.")
    first = models[0][1].tokenizer.get_vocab()
    for name, opened in models[1:]:
        if opened.tokenizer.get_vocab() != first:
            raise UserError(f"{name}: its tokenizer is not that of {models[0][0]}; compare models of one tokenizer.")


def names_of(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, 20):
        names = ["/".join(Path(path).parts[-parts:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    raise UserError(f"{', '.join(paths)}: the same model is named twice.")


def compare(
    paths: Sequence[str],
    text: str,
    reading: Reading,
    *,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    threads: int | None = None,
    tokens: int = 64,
    prompt_tokens: int = 128,
    rounds: int = 3,
    progress: Progress,
) -> Comparison:
    """Measure all models; the first is what the others are compared with."""
    names = names_of(paths)
    opened = [open_model(path) for path in paths]
    check_comparable(list(zip(names, opened, strict=True)))
    context = min(model.model.config.max_seq_len for model in opened)
    if seq_len is not None and seq_len > context:
        raise UserError(f"seq_len = {seq_len}: the smallest context of these models holds {context} tokens.")
    seq_len = seq_len or context  # for all: more context makes the next token easier to guess
    first = opened[0]
    documents = read_documents(first.tokenizer, first.eos_id, text, reading, limit)
    with tempfile.TemporaryDirectory() as folder:
        stored: list[Stored] = []
        scores: list[Scores] = []
        for number, (name, model) in enumerate(zip(names, opened, strict=True)):
            file = Path(folder) / f"{number}.safetensors"
            form, served = store(model.model, model.tokenizer, model.recipe, file)
            stored.append(form)
            scores.append(_score(name, served, model, documents, seq_len, batch_size, progress))
        progress("timing", 0, 0)
        used = threads or torch.get_num_threads()
        tokens, prompt = min(tokens, context - 3), min(prompt_tokens, context)
        speeds = measure_speed(stored, threads=used, tokens=tokens, prompt=prompt, rounds=rounds)
        rows = [
            _row(name, path, model, form, score, None if number == 0 else scores[0], speed)
            for number, (name, path, model, form, score, speed) in enumerate(
                zip(names, paths, opened, stored, scores, speeds, strict=True)
            )
        ]
    return Comparison(
        rows=rows,
        text=text,
        documents=len(documents),
        text_bytes=sum(d.text_bytes for d in documents),
        device=describe_device(torch.device("cpu")),
        threads=used,
        settings={"tokens": tokens, "prompt_tokens": prompt, "rounds": rounds, "seq_len": seq_len},
    )


def _score(
    name: str,
    served: Any,
    model: Opened,
    documents: Sequence[Document],
    seq_len: int,
    batch_size: int,
    progress: Progress,
) -> Scores:
    try:
        return score_documents(
            served,
            model.tokenizer,
            model.eos_id,
            documents,
            seq_len=seq_len,
            batch_size=batch_size,
            progress=lambda done, total: progress(f"reading with {name}", done, total),
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _row(
    name: str, path: str, model: Opened, form: Stored, score: Scores, first: Scores | None, speed: dict[str, float]
) -> Row:
    config = model.model.config
    cost = cost_of(Path(path), config)
    difference = None
    if first is not None:
        difference = (score.bits_per_byte - first.bits_per_byte, *score.interval(minus=first))
    return Row(
        name=name,
        method=method_of(model.recipe or {"name": "BitNet", "weight": "none", "act_bits": "none"}),
        parameters=count_parameters(config).total,
        linear_parameters=count_parameters(config).linear,
        bits_per_parameter=form.bits_per_parameter,
        file_bytes=form.file.stat().st_size,
        bits_per_byte=score.bits_per_byte,
        interval=score.interval(),
        difference=difference,
        perplexity=score.perplexity,
        decode_tokens_per_s=speed["decode_tokens_per_s"],
        prefill_tokens_per_s=speed["prefill_tokens_per_s"],
        memory_mb=speed["peak_rss_mb"] - speed["rss_after_import_mb"],
        own=None if cost is None else cost[0],
        parents=None if cost is None or not cost[1].tokens else cost[1],
    )
