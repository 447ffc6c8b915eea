"""Text from a model: prefill the cache with the prompts, then decode one token of each at a time.

Works for every model of this library, as trained or packed. Prompts of unequal length are aligned at their ends; what
fills the beginnings is seen by no token, and each sequence draws from its own seeded generator, so that a sequence is
the same alone and in company (as far as float32 attention sums in the same order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from bitnet.errors import NO_NUMBERS, UserError
from bitnet.graph import GraphDecoder
from bitnet.model import KVCache, Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits. The filters apply in the order of the fields."""

    repetition_penalty: float = 1.0
    """Divide positive (multiply negative) logits of tokens that occurred before (arXiv 1909.05858); 1 for none."""
    temperature: float = 0.8
    """Divide the logits by this; 0 takes the most likely token."""
    top_k: int = 50
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that together have this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", self.temperature == 0.0 or 1e-4 <= self.temperature < float("inf"), "0, or 0.0001 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "greater than 0"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)}: must be {rule}.")


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (V,) of one sequence after all filters; ``seen`` bool (V,) marks tokens that occurred before."""
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0.0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = logits.index_fill(0, order[before >= sampling.top_p], float("-inf"))
    if sampling.min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    return logits


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> int:
    """Draw a token from the logits (V,) of one sequence. Raises ``UserError`` where they are no numbers."""
    logits = filtered(logits, sampling, seen)
    if not logits.max().isfinite():
        raise UserError(NO_NUMBERS)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def prefill(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Run the prompts (B, T) through the model; logits (B, V) of the tokens after them."""
    logits: Tensor = model(tokens, cache, last_only=True)
    return logits[:, -1]


def decode_one_token(model: Transformer, token: Tensor, cache: KVCache) -> Tensor:
    """Run one token (B, 1) through the model; logits (B, V) of the next."""
    logits: Tensor = model(token, cache)
    return logits[:, -1]


def decoder_of(model: Transformer, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """Token ids (B, 1) -> logits (B, V): a CUDA graph for a model on a GPU that can be captured."""
    if model.decodes_as_graph and cache.keys.is_cuda:
        return GraphDecoder(model, cache)
    return lambda token: decode_one_token(model, token, cache)


class _Sequence:
    """One sequence of a batch: its generator, the tokens it has seen, and whether it goes on."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, vocab_size: int, number: int) -> None:
        self.sampling, self.going = sampling, True
        self.generator = torch.Generator().manual_seed(sampling.seed + number)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[list(prompt)] = True

    def next(self, logits: Tensor) -> int:
        token = sample(logits, self.sampling, self.generator, self.seen)
        if self.seen is not None:
            self.seen[token] = True
        return token


@torch.inference_mode()
def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_id: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt at once, ``None`` for those that have ended.

    A sequence ends before ``stop_id``, after ``max_new_tokens``, or all do when the context is full.
    Raises ``UserError`` for a prompt that is empty, fills the context or holds an unknown token.
    """
    config = model.config
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty: give at least one character.")
        if len(prompt) >= config.max_seq_len:
            raise UserError(f"the prompt has {len(prompt)} tokens; the model's context holds {config.max_seq_len}.")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"the prompt has the token {max(prompt)}; the model knows 0 to {config.vocab_size - 1}.")
    if not prompts or max_new_tokens < 1:
        return
    device = model.norm.weight.device
    longest = max(map(len, prompts))
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    padding = [longest - len(prompt) for prompt in prompts]
    if any(padding):
        cache.first = torch.tensor(padding, device=device)
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    sequences = [_Sequence(prompt, sampling, config.vocab_size, i) for i, prompt in enumerate(prompts)]
    logits = prefill(model, torch.tensor(rows, device=device), cache)
    decode = decoder_of(model, cache)
    for produced in range(1, max_new_tokens + 1):
        on_cpu = logits.float().cpu()
        tokens: list[int | None] = []
        for sequence, row in zip(sequences, on_cpu, strict=True):
            token = sequence.next(row) if sequence.going else None
            sequence.going = token is not None and token != stop_id
            tokens.append(token if sequence.going else None)
        if not any(sequence.going for sequence in sequences):
            return
        yield tokens
        if produced == max_new_tokens or cache.length == cache.max_len:
            return
        logits = decode(torch.tensor([[0 if token is None else token] for token in tokens], device=device))


def generate_tokens(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_id: int | None = None
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` ids that continue ``prompt``; see ``generate_batch``."""
    for (token,) in generate_batch(model, [prompt], max_new_tokens, sampling, stop_id):
        assert token is not None
        yield token


class TextStream:
    """Tokens in, text out: holds back halves of characters and what may be the beginning of a stop string.

    Tokens are decoded after those that were shown last, since what one stands for depends on its neighbours: spaces at
    the beginning, characters of several tokens. (``tokenizers.DecodeStream`` fails on bytes that are no UTF-8.)
    """

    BEFORE = 8
    """Tokens of the prompt that are decoded with the first new ones."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids = list(prompt[-self.BEFORE :])
        self._shown = len(self._ids)
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; sets ``ended`` when a stop string is complete."""
        self._ids.append(token)
        parts = (self._ids[: self._shown], self._ids)
        before, now = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in parts)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._held += now[len(before) :]
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.ended = True
            return self._release(min(found))
        possible = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
        return self._release(len(self._held) - max(possible, default=0))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.ended else self._release(len(self._held))

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text


def stream_batch(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stop_id: int | None = None,
) -> Iterator[list[str]]:
    """Yield the new text of every prompt, step by step; a text ends before any string of ``stop`` and ``stop_id``.

    A prompt is text or ids; before a text goes what the tokenizer puts before every text, such as a BOS token.
    """
    ids = [tokenizer.encode(p).ids if isinstance(p, str) else list(p) for p in prompts]
    streams = [TextStream(tokenizer, prompt, stop) for prompt in ids]
    for tokens in generate_batch(model, ids, max_new_tokens, sampling or Sampling(), stop_id):
        pairs = zip(streams, tokens, strict=True)
        yield ["" if token is None or s.ended else s.push(token) for s, token in pairs]
        if all(s.ended or token is None for s, token in zip(streams, tokens, strict=True)):
            break
    yield [s.finish() for s in streams]


@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **options: object) -> str: ...
@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: list[str], **options: object) -> list[str]: ...
def generate(model, tokenizer, prompt, *, max_new_tokens=100, stop=(), stop_id=None, sampling=None, **fields):  # type: ignore[no-untyped-def]
    """Continue one prompt (a string) or several (a list); returns the new text only, as a string or a list.

    ``stop`` are strings that end a text, ``stop_id`` a token; other options are fields of ``Sampling``, such as
    ``temperature=0``.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sampling = replace(sampling or Sampling(), **fields)
    steps = stream_batch(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, stop_id=stop_id
    )
    texts = ["".join(parts) for parts in zip(*steps, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts
