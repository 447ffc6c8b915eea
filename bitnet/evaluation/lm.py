"""``BitNetLM``: any model of this library as an ``LM`` of lm-eval, so that every task of it runs on ours.

from bitnet.evaluation.lm import BitNetLM
lm_eval.simple_evaluate(model=BitNetLM(model, tokenizer), tasks=[...], bootstrap_iters=0)
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.data.tokenizer import begin_id, find_eos
from bitnet.errors import UserError
from bitnet.generation import Sampling, stream_batch
from bitnet.model import Transformer

Request = tuple[Any, list[int], list[int]]
"""What was asked, its context and its continuation in ids."""


class BitNetLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and greedy text of ``model``, as lm-eval asks for them.

    ``batch_tokens`` bounds the tokens of a forward; a context that is too long loses its beginning, as usual there.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 2048,
        eos_id: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.bpe, self.batch_tokens, self.progress = model, tokenizer, batch_tokens, progress
        self._eos_id = find_eos(tokenizer) if eos_id is None else eos_id

    @property
    def eot_token_id(self) -> int:
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which the first token counts, too: what the tokenizer begins texts with."""
        return begin_id(self.bpe, self._eos_id)

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.model.config.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.bpe.encode(string, add_special_tokens=add_special_tokens is not False).ids)

    def _inputs(self, context: list[int], continuation: list[int]) -> list[int]:
        """What the model reads: all but the last token, cut at the left to the context."""
        return (context + continuation)[:-1][-self.max_length :]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"an answer of {longest} tokens does not fit into the model's context of {self.max_length}."
            )
        rows = [self._inputs(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        done = 0
        while done < len(order):
            width = len(rows[order[done]])
            batch = order[done : done + max(1, self.batch_tokens // width)]
            padded = torch.zeros(len(batch), width, dtype=torch.int64, device=self.model.norm.weight.device)
            for row, i in enumerate(batch):
                padded[row, : len(rows[i])] = torch.tensor(rows[i])
            logits = self.model(padded)
            for row, i in enumerate(batch):
                answers[i] = _score(logits[row, : len(rows[i])], requests[i][2])
            done += len(batch)
            if self.progress:
                self.progress(done, len(order))
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # one bar is enough
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        counts = []
        for request in requests:
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += new
            counts.append(len(new))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for number, request in enumerate(requests, start=1):
            context, options = request.args
            until = options.get("until") or []
            room = min(int(options.get("max_gen_toks", 256)), self.max_length // 2)
            ids = self.tok_encode(context)[-(self.max_length - room) :]
            steps = stream_batch(
                self.model,
                self.bpe,
                [ids],
                max_new_tokens=room,
                sampling=Sampling(temperature=float(options.get("temperature", 0.0))),
                stop=[until] if isinstance(until, str) else until,
                stop_id=self._eos_id,
            )
            texts.append("".join(text for (text,) in steps))
            if self.progress:
                self.progress(number, len(requests))
        return texts


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Logits (T, V), of which the last ones predict ``continuation`` -> (its log-probability, whether it is greedy)."""
    wanted = torch.tensor(continuation, device=logits.device)
    last = logits[-len(continuation) :].float()
    chosen = last.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((last.argmax(-1) == wanted).all())
