"""Models as they are stored: what a file of each takes, and how fast and large it is when it is served from there.

Low-bit models are packed files. A float model is stored, and multiplied, in bfloat16. Embedding and head take 16 bits
in all of them, so that tables compare the rest.
"""

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bitnet.config import ModelConfig
from bitnet.estimate import count_parameters
from bitnet.inference.bench import serving_speed
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.header import read_header
from bitnet.inference.packed_linear import HeadDtype
from bitnet.inference.packed_model import PackedTransformer
from bitnet.inference.packing import pack
from bitnet.layers import low_bit_layers, quantized_layers
from bitnet.model import Transformer, float_model
from bitnet.tensor_file import TensorFile, layout, write

HEAD: HeadDtype = "float16"


@dataclass(frozen=True)
class Stored:
    """A model file and what it takes."""

    file: Path
    config: ModelConfig
    tensor_bytes: int
    is_packed: bool

    @property
    def bits_per_parameter(self) -> float:
        """Of everything: weights, scales, zero points, embedding, head, norms."""
        return 8 * self.tensor_bytes / count_parameters(self.config).total


def is_low_bit(model: Transformer) -> bool:
    return isinstance(model, PackedTransformer) or bool(low_bit_layers(model) or quantized_layers(model))


def store(model: Transformer, tokenizer: Tokenizer, recipe: dict[str, Any], file: Path) -> tuple[Stored, Transformer]:
    """Write ``model`` to ``file`` in the form that it is stored in; also returns the model that is then served."""
    config = model.config
    if is_low_bit(model):
        packed = model if isinstance(model, PackedTransformer) else pack(model, head=HEAD)
        save_packed(packed, tokenizer, file, recipe=recipe)
        size = sum(entry.nbytes for entry in read_header(file).tensors.values())
        return Stored(file, config, size, True), packed
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    header, order = layout(state, {})
    write(file, header, (state[name] for name in order))
    rounded = float_model(config, state).float()
    return Stored(file, config, sum(t.nbytes for t in state.values()), False), rounded


def read_all(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file."""
    opened = TensorFile(file)
    return {name: opened.read(name) for name in opened.entries}


def _measure(file: str, config: ModelConfig | None, threads: int, tokens: int, prompt: int) -> dict[str, float]:
    """Runs in a process of its own."""

    def load() -> Transformer:
        return load_packed(file)[0] if config is None else float_model(config, read_all(Path(file)))

    return serving_speed(load, threads=threads, tokens=tokens, prompt=prompt)


def measure_speed(
    stored: list[Stored], *, threads: int, tokens: int, prompt: int, rounds: int
) -> list[dict[str, float]]:
    """Decode and prefill speed and peak memory of each model: medians over ``rounds`` in which all take turns."""
    found: list[list[dict[str, float]]] = [[] for _ in stored]
    for _ in range(rounds):
        for results, model in zip(found, stored, strict=True):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                config = None if model.is_packed else model.config
                results.append(pool.submit(_measure, str(model.file), config, threads, tokens, prompt).result())
    return [{key: statistics.median(r[key] for r in results) for key in results[0]} for results in found]
