"""Text of the model's own: how it begins, what is drawn, and that everybody gets a turn."""

import pytest
import torch

from bitnet.errors import UserError
from bitnet.generation import Sampling, generate_tokens
from bitnet.synthesis import GREEDY_TOKENS, synthesize
from tests.recipes.conftest import random_model


def test_every_token_begins_a_text_in_turn() -> None:
    texts = list(synthesize(random_model(), sequences=130, length=8, batch_size=32, stop_id=7))
    assert len(texts) == 130
    assert [text[0] for text in texts] == ([i for i in range(64) if i != 7] * 3)[:130]
    assert all(1 <= len(text) <= 8 and 7 not in text for text in texts)


def test_the_beginning_is_greedy_and_the_rest_is_drawn() -> None:
    model = random_model()
    one, two = (list(synthesize(model, sequences=96, length=16, batch_size=32, seed=seed)) for seed in (0, 1))
    again = list(synthesize(model, sequences=96, length=16, batch_size=32))
    assert one == again
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        likely = GREEDY_TOKENS[i // 32]
        expected = list(generate_tokens(model, a[:1], likely, Sampling(temperature=0.0)))
        assert a[1 : 1 + likely] == b[1 : 1 + likely] == expected
    drawn = [
        (a[1 + GREEDY_TOKENS[i // 32] :], b[1 + GREEDY_TOKENS[i // 32] :])
        for i, (a, b) in enumerate(zip(one, two, strict=True))
    ]
    assert sum(a != b for a, b in drawn) > 90


def test_draws_follow_the_whole_distribution() -> None:
    """The first drawn token after one context, many times, against the probabilities of the model."""
    model = random_model()
    texts = [t for s in range(400) for t in synthesize(model, sequences=1, length=6, batch_size=1, seed=s)]
    with torch.inference_mode():
        p = model(torch.tensor([texts[0][:4]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([text[4] for text in texts]), minlength=64)
    likely = p.topk(5).indices
    for token in likely.tolist():
        spread = (400 * float(p[token]) * (1 - float(p[token]))) ** 0.5
        assert abs(int(counts[token]) - 400 * float(p[token])) < 4.5 * spread + 1


def test_greedy_to_the_end() -> None:
    model = random_model()
    (text,) = synthesize(model, sequences=1, length=12, sampled=False)
    assert text[1:] == list(generate_tokens(model, [0], 11, Sampling(temperature=0.0)))


@pytest.mark.parametrize(
    "options,named", [({"length": 1}, "length"), ({"length": 99}, "length"), ({"sequences": 0}, "sequences")]
)
def test_impossible_wishes_are_refused(options, named) -> None:
    with pytest.raises(UserError, match=named):
        list(synthesize(random_model(), **{"sequences": 4, "length": 8, **options}))
