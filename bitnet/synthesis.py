"""Text that a model makes up itself, to train a low-bit copy of it without data (LLM-QAT, arXiv 2305.17888, 3.1).

Every token of the vocabulary begins a sequence in turn. The next three to five tokens are the most likely ones, so that
the text starts well; the rest is drawn from the full distribution, since greedy text repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bitnet.errors import UserError
from bitnet.generation import Sampling, generate_batch
from bitnet.model import Transformer

GREEDY_TOKENS = (3, 4, 5)


def _continued(
    model: Transformer, prompts: Sequence[list[int]], tokens: int, sampling: Sampling, stop_id: int | None
) -> list[list[int]]:
    texts = [list(prompt) for prompt in prompts]
    for step in generate_batch(model, prompts, tokens, sampling, stop_id):
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
    return texts


def synthesize(
    model: Transformer,
    *,
    sequences: int,
    length: int,
    greedy_tokens: Sequence[int] = GREEDY_TOKENS,
    sampled: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    stop_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """Yield ``sequences`` lists of up to ``length`` token ids; a shorter one has ended before ``stop_id``.

    Sequence i begins with token i (modulo the vocabulary, ``stop_id`` left out). Then come as many of the most likely
    tokens as ``greedy_tokens`` says for its batch, in turn, then drawn ones; with ``sampled=False`` likely ones only.
    Raises ``UserError`` for a length beyond the model's context.
    """
    if not 2 <= length <= model.config.max_seq_len:
        raise UserError(f"length = {length}: must be between 2 and the model's context of {model.config.max_seq_len}.")
    for name, value in (("sequences", sequences), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} = {value}: must be at least 1.")
    starts = [token for token in range(model.config.vocab_size) if token != stop_id]
    greedy = Sampling(temperature=0.0)
    for first in range(0, sequences, batch_size):
        numbers = range(first, min(first + batch_size, sequences))
        prompts = [[starts[i % len(starts)]] for i in numbers]
        if not sampled:
            texts = _continued(model, prompts, length - 1, greedy, stop_id)
        else:
            likely = min(greedy_tokens[first // batch_size % len(greedy_tokens)], length - 1)
            texts = _continued(model, prompts, likely, greedy, stop_id)
            going = [i for i, text in enumerate(texts) if len(text) == 1 + likely < length]
            drawing = Sampling(temperature=1.0, top_k=0, seed=seed + first)
            drawn = _continued(model, [texts[i] for i in going], length - 1 - likely, drawing, stop_id)
            for i, text in zip(going, drawn, strict=True):
                texts[i] = text
        yield from texts
        if progress:
            progress(numbers[-1] + 1, sequences)
