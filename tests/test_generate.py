"""Generation: greedy text equals a plain loop without a cache, sampling obeys its settings, bad prompts are refused."""

import pytest
import torch

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.generate import Sampling, generate_tokens, sample
from bitnet.model import Transformer


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, ffn_dim=48, max_seq_len=32, init_std=0.3)
    return Transformer(config).eval()


def test_greedy_equals_the_loop_without_a_cache(model) -> None:
    ids = [3, 1, 4]
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate_tokens(model, [3, 1, 4], 20, Sampling(temperature=0.0))) == ids[3:]


def test_seed_decides_and_context_is_the_limit(model) -> None:
    draw = lambda seed, n: list(generate_tokens(model, [1, 2], n, Sampling(temperature=1.0, top_k=0, seed=seed)))  # noqa: E731
    assert draw(1, 20) == draw(1, 20) != draw(2, 20)
    assert draw(1, 20)[:10] == draw(1, 10)
    assert len(draw(1, 500)) == 31  # 30 tokens fit, and the last one drawn needs no place


def test_stop_token_ends_without_being_shown(model) -> None:
    ids = list(generate_tokens(model, [5], 20, Sampling(temperature=0.0)))
    stop = ids[4]
    assert list(generate_tokens(model, [5], 20, Sampling(temperature=0.0), stop_id=stop)) == ids[: ids.index(stop)]


def test_top_k_and_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, Sampling(temperature=1.0, top_k=2), generator)
    assert set(drawn.flatten().tolist()) == {2, 3}
    share = (drawn == 3).float().mean().item()
    assert share == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.03)
    hot = sample(logits, Sampling(temperature=100.0, top_k=0), generator)
    assert torch.bincount(hot.flatten()).tolist() == pytest.approx([1000] * 4, abs=150)


@pytest.mark.parametrize(
    "prompt,message", [([], "prompt is empty"), (list(range(32)), "32 tokens; the model's context holds 32")]
)
def test_bad_prompts(model, prompt, message) -> None:
    with pytest.raises(UserError, match=message):
        list(generate_tokens(model, prompt, 5, Sampling()))
    with pytest.raises(UserError, match="temperature = -1"):
        Sampling(temperature=-1)
