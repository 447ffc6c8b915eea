"""The proof of an export: the other program reads it, and its probabilities are compared with ours.

The texts that are compared are what the model itself writes, so that their tokens are likely ones. The other program
runs in a process of its own, by a script that imports nothing of this library; where it is not installed, the report
says so. An export that misses its bound is never given its name.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bitnet.errors import UserError
from bitnet.generation import Sampling, generate_tokens
from bitnet.interchange import read_by_ik_llama_cpp, read_by_llama_cpp, read_by_transformers
from bitnet.interchange.opened import Opened
from bitnet.interchange.parts import without_activation_quantization
from bitnet.model import Transformer

TEXTS = (
    "The 12 cats didn't sleep.",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d",
    "\U0001f600 \u4f60\u597d \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "tabs\tand  spaces \r\n\r\n  end ",
    "def f(x):\n    return x**2 # 3.14159",
)
"""Strings that tokenizers disagree about."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What an export must meet, and against which forward of ours."""

    against: str = "this library"
    difference: float | None = None
    """Largest absolute difference of a logit (of a log-probability where a program gives no logits)."""
    kl: float | None = None
    argmax: float | None = None
    float_activations: bool = False

    def __str__(self) -> str:
        parts = []
        if self.difference is not None:
            parts.append("equality" if self.difference == 0 else f"difference < {self.difference:g}")
        if self.kl is not None:
            parts.append(f"KL < {self.kl:g}")
        if self.argmax is not None:
            parts.append(f"argmax >= {self.argmax:.0%}")
        return ", ".join(parts)


FLOAT = "this library without activation quantization"
EXACT = Bound(difference=0.0)
LAST_BITS = Bound(kl=1e-4, argmax=0.99)
ROUNDED = Bound(kl=1e-2, argmax=0.9)
"""Embedding, norms and scales in bfloat16, and a forward in it."""
SAME_GRAPH = Bound(difference=1e-4, against=FLOAT, float_activations=True)
HALF = Bound(kl=1e-4, argmax=0.99, against=FLOAT, float_activations=True)
BLOCK_ACTIVATIONS = Bound(kl=1e-3, argmax=0.9)
"""int8 activations with a scale for every block of a row: llama.cpp's ternary products."""


SAME_WEIGHTS = Bound(difference=1e-4)
"""The same float32 graph, its sums in another order."""
OTHER_ACTIVATIONS = Bound(kl=1e-2, argmax=0.9)
"""8-bit activations whose scale is max|x| / 127.5 instead of 127: roundings fall elsewhere."""


def bound_of_hf(form: str, dtype: str, integer_activations: bool = False) -> Bound:
    """What a Hugging Face folder must meet."""
    if form == "compressed-tensors" and dtype == "float32":
        return OTHER_ACTIVATIONS if integer_activations else SAME_WEIGHTS
    if dtype != "float32":
        return Bound(kl=ROUNDED.kl, argmax=ROUNDED.argmax, float_activations=form == "dense")
    return {"bitlinear": EXACT, "dense": SAME_GRAPH}.get(form, LAST_BITS)


def bound_of_gguf(kind: str) -> Bound:
    """What a GGUF file must meet."""
    return {"f32": SAME_GRAPH, "f16": HALF}.get(kind, BLOCK_ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two programs on the same tokens: log-probabilities (T, V) of each."""

    tokens: int
    difference: float
    mean_difference: float
    kl: float
    argmax: float

    def failures(self, bound: Bound) -> list[str]:
        """What misses the bound, in words; NaN misses every bound."""
        missed = []
        if bound.difference is not None:
            exact = bound.difference == 0
            if not (self.difference == 0 if exact else self.difference < bound.difference):
                missed.append(f"the largest difference is {self.difference:.3g}")
        if bound.kl is not None and not self.kl < bound.kl:
            missed.append(f"the KL divergence is {self.kl:.3g}")
        if bound.argmax is not None and not self.argmax >= bound.argmax:
            missed.append(f"the most likely tokens agree for {self.argmax:.1%}")
        return missed


def compare(ours: Tensor, theirs: Tensor, logits: bool) -> Comparison:
    """Both (T, V): logits, or log-probabilities where ``logits`` is false (ours are logits always).

    Theirs are normalized in any case: llama.cpp adds the probabilities of a large vocabulary in float32, so that all
    its logarithms are off by 2e-4 alike.
    """
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    difference = (ours.double() - theirs.double() if logits else p - q).abs()
    return Comparison(
        tokens=ours.shape[0],
        difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        argmax=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    )


SHORTEST = 8
"""Tokens of a text that is compared."""


def own_texts(opened: Opened, tokens: int) -> list[list[int]]:
    """Ids of texts that the model writes, ``tokens`` in all: several of about one length where its context is short.
    None of a few tokens only, whose head other kernels compute, in another order (``PackedLinear``)."""
    start = [opened.eos_id]
    room = max(1, opened.model.config.max_seq_len - 1)  # other programs want to write one more
    count = -(-tokens // room)
    texts = []
    for seed in range(count):
        length = min(room, max(tokens // count + (seed < tokens % count), SHORTEST))
        sampling = Sampling(temperature=1.0, top_k=0, seed=seed)
        more = generate_tokens(opened.model, start, length - 1, sampling) if length > 1 else ()
        texts.append(start + list(more))
    return texts


def logits_of(model: Transformer, texts: list[list[int]]) -> Tensor:
    """(T, V) of all texts, one after another, each in one pass."""
    device = model.norm.weight.device
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([ids], device=device))[0].float().cpu() for ids in texts])


def _run(script: Any, target: Path, request: dict[str, Any], program: str) -> dict[str, Any]:
    """Ask the other program in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ask, out = Path(folder) / "request.json", Path(folder) / "answer.npz"
        ask.write_text(json.dumps(request), encoding="utf-8")
        # Without TORCHDYNAMO_DISABLE transformers compiles its quantizers for a minute, and needs a C++ compiler.
        environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script.__file__, str(target), str(ask), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            raise UserError(f"{program} could not read it ({(errors or lines or ['no message'])[-1].strip()[:200]}).")
        with np.load(out) as answer:
            return {name: answer[name] for name in answer.files}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the other program found; ``problems`` is empty when everything holds."""

    program: str
    comparison: Comparison | None
    bound: Bound
    problems: list[str]
    why_not: str = ""

    def lines(self) -> list[str]:
        """For people: each figure with the bound that it must meet."""
        if self.comparison is None:
            return [f"check       not done: {self.why_not}"]
        c = self.comparison
        return [
            f"check       {self.program} against {self.bound.against}, {c.tokens} tokens",
            f"  difference  max {c.difference:.3g}, mean {c.mean_difference:.3g}",
            f"  KL          {c.kl:.3g} nats",
            f"  argmax      {c.argmax:.1%} agree",
            f"  bound       {self.bound}: {'missed' if self.problems else 'met'}",
        ]


def _tokens_differ(opened: Opened, answer: dict[str, Any], add_special_tokens: bool) -> list[str]:
    mine = [opened.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids for text in TEXTS]
    theirs = json.loads(str(answer["tokens"]))
    wrong = [text for text, a, b in zip(TEXTS, mine, theirs, strict=True) if a != b]
    return [f"{len(wrong)} of {len(TEXTS)} texts have other tokens, such as {wrong[0]!r}"] if wrong else []


@dataclass(frozen=True)
class Program:
    """A program that reads exports: the script that asks it, what must be installed, and what it answers."""

    name: str
    script: Any
    packages: tuple[str, ...]
    missing: str
    """What is said where one of the packages is not installed."""
    version: str
    """What is said of it, with ``{}`` for its version."""
    has_logits: bool = True
    """Whether it gives logits, or log-probabilities."""
    special: bool = False
    """Whether it puts around a text what the tokenizer does."""


TRANSFORMERS = Program(
    "transformers",
    read_by_transformers,
    ("transformers", "accelerate"),
    "transformers and accelerate are not installed (pip install 'bitnet-lightning[hf]')",
    "transformers {}",
    special=True,
)
LLAMA_CPP = Program(
    "llama.cpp",
    read_by_llama_cpp,
    ("xllamacpp",),
    "llama.cpp is not installed (pip install xllamacpp)",
    "llama.cpp (xllamacpp {})",
    has_logits=False,
)
IK_LLAMA_CPP = Program(
    "ik_llama.cpp",
    read_by_ik_llama_cpp,
    ("ik_llama_cpp",),
    "ik_llama.cpp, which has this graph, is not installed (pip install ik-llama-cpp-python)",
    "ik_llama.cpp (ik-llama-cpp-python {})",
)


def _check(
    program: Program, opened: Opened, target: Path, bound: Bound, tokens: int, why_not: str = "", **request: Any
) -> Report:
    """Compare what ``program`` makes of ``target`` with ``opened``, unless there is something ``why_not``."""
    if not tokens:
        why_not = "--check_tokens 0"
    elif not all(importlib.util.find_spec(name) for name in program.packages):
        why_not = program.missing
    if why_not:
        return Report(program="", comparison=None, bound=bound, problems=[], why_not=why_not)
    console = Console(stderr=True)
    wait = console.status("comparing with the other program") if console.is_terminal else contextlib.nullcontext()
    with wait:
        texts = own_texts(opened, tokens)
        request |= {"ids": texts, "texts": TEXTS, "threads": torch.get_num_threads()}
        answer = _run(program.script, target, request, program.name)
    theirs = torch.from_numpy(answer["logits" if program.has_logits else "logprobs"])
    if not program.has_logits:  # a probability that rounds to 0 in float32 has no logarithm there
        theirs = torch.nan_to_num(theirs, nan=-105.0, neginf=-105.0)
    model = without_activation_quantization(opened.model) if bound.float_activations else opened.model
    found = compare(logits_of(model, texts), theirs, program.has_logits)
    problems = found.failures(bound) + _tokens_differ(opened, answer, program.special)
    said = program.version.format(answer["version"])
    return Report(program=said, comparison=found, bound=bound, problems=problems)


def check_hf(opened: Opened, folder: Path, bound: Bound, tokens: int, needs: tuple[str, ...] = ()) -> Report:
    """Compare a Hugging Face folder, as transformers computes it with the packages it ``needs``, with ``opened``."""
    missing = [name.replace("_", "-") for name in needs if importlib.util.find_spec(name) is None]
    why_not = f"{missing[0]} is not installed (pip install 'bitnet-lightning[hf]')" if missing else ""
    return _check(TRANSFORMERS, opened, folder, bound, tokens, why_not)


def _plain_token(opened: Opened) -> int:
    """An id whose text is a whole word or letter."""
    ids = range(opened.model.config.vocab_size)
    return next(i for i in ids if (opened.tokenizer.id_to_token(i) or "").isalpha())


def check_gguf(opened: Opened, file: Path, bound: Bound, tokens: int) -> Report:
    """Compare a GGUF file, as llama.cpp computes it, with ``opened``."""
    vocab_size, plain = opened.model.config.vocab_size, _plain_token(opened)
    return _check(LLAMA_CPP, opened, file, bound, tokens, vocab_size=vocab_size, plain=plain)


IK_ROW = 512
"""Fewest weights of a row of ik_llama.cpp's ternary type."""


def check_gguf_in_ik(opened: Opened, file: Path, kind: str, tokens: int) -> Report:
    """Compare a GGUF file that llama.cpp cannot run, as ik_llama.cpp computes it; I2_S after it has requantized it."""
    config, packs = opened.model.config, kind == "i2_s"
    narrow = packs and min(config.dim, config.ffn_dim) < IK_ROW
    why_not = f"ik_llama.cpp wants rows of at least {IK_ROW} weights" if narrow else ""
    bound, requantize = (BLOCK_ACTIVATIONS, "IQ2_BN") if packs else (HALF, None)
    return _check(
        IK_LLAMA_CPP, opened, file, bound, tokens, why_not, vocab_size=config.vocab_size, requantize=requantize
    )
