"""Talking to a model: what was said becomes a prompt by its chat template, and the answer is written piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bitnet.chat_template import Message, check_template, render
from bitnet.data.tokenizer import template_tokens
from bitnet.errors import UserError
from bitnet.generation import Sampling, TextStream, generate_tokens
from bitnet.model import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Conversation:
    """What was said so far. Each answer is made from all of it, or from its newest part that fits the context."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: str | None, eos_id: int) -> None:
        self.model, self.tokenizer, self.template, self.eos_id = model, tokenizer, template, eos_id
        self.messages: list[Message] = []
        self.named = template_tokens(tokenizer, eos_id)
        check_template(template, self.named)

    def _prompt(self, room: int) -> list[int]:
        """Ids of the newest messages that leave ``room`` for an answer."""
        limit = self.model.config.max_seq_len - room
        for start in range(0, len(self.messages), 2):  # drop question and answer together
            text = render(self.messages[start:], self.template, self.named, answer_follows=True)
            ids = self.tokenizer.encode(text).ids
            if len(ids) <= limit:
                return list(ids)
        raise UserError(f"what was said does not fit into {limit} tokens of the context; say less.")

    def answer(
        self, said: str, *, max_new_tokens: int = 100, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Add what the user ``said``; yield the answer piece by piece, and add it."""
        self.messages.append({"role": "user", "content": said})
        room = min(max_new_tokens, self.model.config.max_seq_len // 2)
        try:
            prompt = self._prompt(room)
        except UserError:
            self.messages.pop()
            raise
        stream = TextStream(self.tokenizer, prompt, [*stop, "\nUser:"] if self.template is None else stop)
        parts: list[str] = []

        def piece(text: str) -> str:
            text = text if parts else text.lstrip()
            if text:
                parts.append(text)
            return text

        for token in generate_tokens(self.model, prompt, room, sampling or Sampling(), self.eos_id):
            if text := piece(stream.push(token)):
                yield text
            if stream.ended:
                break
        if text := piece(stream.finish()):
            yield text
        self.messages.append({"role": "assistant", "content": "".join(parts).strip()})
