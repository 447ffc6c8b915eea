"""Text from a model: prefill the cache with the prompt, then decode one token at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.errors import UserError
from bitnet.model import KVCache, Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits. ``temperature`` 0 takes the most likely one."""

    temperature: float = 0.8
    top_k: int = 50
    """Keep only the k most likely tokens; 0 keeps all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: must be 0 or more.")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be 0 or more.")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Logits (B, V) -> token ids (B, 1)."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def prefill(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Run the prompt (B, T) through the model; logits (B, V) of the token after it."""
    logits: Tensor = model(tokens, cache)
    return logits[:, -1]


def decode_one_token(model: Transformer, token: Tensor, cache: KVCache) -> Tensor:
    """Run one token (B, 1) through the model; logits (B, V) of the next."""
    logits: Tensor = model(token, cache)
    return logits[:, -1]


@torch.inference_mode()
def generate_tokens(
    model: Transformer, prompt: list[int], max_new_tokens: int, sampling: Sampling, stop_id: int | None = None
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` ids that continue ``prompt``; end before ``stop_id`` or when the context is full.

    Raises ``UserError`` for an empty prompt or one that fills the context.
    """
    limit = model.config.max_seq_len
    if not prompt:
        raise UserError("the prompt is empty: give at least one character.")
    if len(prompt) >= limit:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model's context holds {limit}.")
    device = model.tok_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    logits = prefill(model, torch.tensor([prompt], device=device), cache)
    for produced in range(1, max_new_tokens + 1):
        token = sample(logits, sampling, generator)
        token_id = int(token)
        if token_id == stop_id:
            return
        yield token_id
        if produced == max_new_tokens or cache.length == cache.max_len:
            return
        logits = decode_one_token(model, token, cache)
