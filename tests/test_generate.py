"""Generation: greedy text equals a plain loop without a cache, sampling obeys its settings, bad prompts are refused."""

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.generation import (
    Sampling,
    TextStream,
    decode_one_token,
    filtered,
    generate,
    generate_batch,
    generate_tokens,
    prefill,
    sample,
)
from bitnet.graph import GraphDecoder
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
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits, Sampling(temperature=1.0, top_k=2), generator) for _ in range(4000)])
    assert set(drawn.tolist()) == {2, 3}
    share = (drawn == 3).float().mean().item()
    assert share == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.03)
    hot = torch.tensor([sample(logits, Sampling(temperature=100.0, top_k=0), generator) for _ in range(4000)])
    assert torch.bincount(hot).tolist() == pytest.approx([1000] * 4, abs=150)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5])
def test_filters_equal_those_of_transformers(penalty: float, top_k: int, top_p: float, min_p: float) -> None:
    hf = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    for _ in range(20):
        logits, ids = torch.randn(1, 50) * 3, torch.randint(50, (1, 12))
        seen = torch.zeros(50, dtype=torch.bool)
        seen[ids[0]] = True
        ours = filtered(
            logits[0],
            Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty),
            seen,
        )
        theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits) if penalty != 1 else logits
        theirs = hf.TemperatureLogitsWarper(0.7)(ids, theirs)
        if top_k:
            theirs = hf.TopKLogitsWarper(top_k)(ids, theirs)
        if top_p < 1:
            theirs = hf.TopPLogitsWarper(top_p)(ids, theirs)
        if min_p:
            theirs = hf.MinPLogitsWarper(min_p)(ids, theirs)
        assert torch.equal(ours, theirs[0])


def test_a_batch_of_unequal_prompts_equals_each_alone(model) -> None:
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3], [5, 8]]
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, seed=7, repetition_penalty=1.2)):
        together = list(zip(*generate_batch(model, prompts, 12, sampling), strict=True))
        for i, prompt in enumerate(prompts):
            alone = generate_tokens(model, prompt, 12, replace(sampling, seed=sampling.seed + i))
            assert list(together[i]) == list(alone)


def test_sequences_of_a_batch_end_one_by_one(model) -> None:
    greedy = Sampling(temperature=0.0)
    alone = [list(generate_tokens(model, prompt, 10, greedy)) for prompt in ([5], [7, 7])]
    stop = next(t for t in alone[0] if t not in alone[1])
    steps = list(generate_batch(model, [[5], [7, 7]], 10, greedy, stop_id=stop))
    assert [t for t, _ in steps if t is not None] == alone[0][: alone[0].index(stop)]
    assert [t for _, t in steps] == alone[1]


def test_a_static_cache_gives_the_same_tokens(model) -> None:
    """What a CUDA graph replays, step by step without the graph."""
    for first in (None, torch.tensor([0, 2])):
        tokens = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]])
        caches = [model.new_cache(2, 30) for _ in range(2)]
        with torch.inference_mode():
            for cache in caches:
                cache.first = first
                logits = prefill(model, tokens, cache)
            graph = GraphDecoder(model, caches[1])
            for _ in range(20):
                token = logits.argmax(-1, keepdim=True)
                logits, static = decode_one_token(model, token, caches[0]), graph(token)
                assert torch.allclose(logits, static, atol=1e-5)
                assert torch.equal(logits.argmax(-1), static.argmax(-1))
        assert caches[0].length == caches[1].length


class _Letters:
    """A tokenizer of single bytes, with a character of two bytes split between tokens."""

    def __new__(cls) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer


def test_stop_strings_and_split_characters() -> None:
    tokenizer = _Letters()

    def stream(text: str, stop: list[str]) -> list[str]:
        out = TextStream(tokenizer, tokenizer.encode("x").ids, stop)
        pieces = []
        for token in tokenizer.encode(text).ids:
            pieces.append(out.push(token))
            if out.ended:
                break
        return [*pieces, out.finish()]

    assert "".join(stream("caf\u00e9!", [])) == "caf\u00e9!"
    assert stream("\u00e9", [])[0] == ""  # half a character is held back
    assert "".join(stream("one END two", ["END"])) == "one "
    assert "".join(stream("one ENd two", ["END"])) == "one ENd two"
    assert "".join(stream("one EN", ["END"])) == "one EN"
    assert stream("a\n\nb", ["\n\n"]) == ["a", "", "", ""]


def test_bytes_that_are_no_text_are_streamed_as_they_are_decoded() -> None:
    """With tokens for single bytes beside those of words, as Llama 2 has them; a prompt may end inside a character."""
    words = [f"\u2581{word}" for word in ("the", "cat", "y")]
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "a", *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    byte = lambda value: vocab[f"<0x{value:02X}>"]  # noqa: E731
    the, a = vocab[words[0]], vocab["a"]
    for written, text in (
        ([byte(10), byte(0x80), a], "\n\ufffda"),  # the line end was shown before anybody knew of the byte behind it
        ([byte(0xC3), byte(0xA9), a], "\u00e9a"),
        ([byte(0xC3), the, byte(0xC3), byte(0xA9)], "\ufffd the\u00e9"),
    ):
        stream = TextStream(tokenizer, [the])
        assert "".join(stream.push(token) for token in written) == text
    stream = TextStream(tokenizer, [the, byte(0xC3)])  # shown as one U+FFFD already
    assert [stream.push(token) for token in (a, a)] == ["a", "a"]


def test_text_in_text_out(model) -> None:
    tokenizer = _Letters()
    model = Transformer(replace(model.config, vocab_size=256)).eval()
    texts = generate(model, tokenizer, ["ab", "c"], max_new_tokens=5, temperature=0.0)
    assert texts == [generate(model, tokenizer, p, max_new_tokens=5, temperature=0.0) for p in ("ab", "c")]
    with pytest.raises(TypeError, match="temprature"):
        generate(model, tokenizer, "a", temprature=1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_model_that_went_wrong_says_so(model, value, temperature) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight.fill_(float(value))
    with pytest.raises(UserError, match="the logits of this model are nan or infinite"):
        list(generate_tokens(broken, [1, 2], 5, Sampling(temperature=temperature)))


@pytest.mark.parametrize(
    "prompt,message", [([], "prompt is empty"), (list(range(32)), "32 tokens; the model's context holds 32")]
)
def test_bad_prompts(model, prompt, message) -> None:
    with pytest.raises(UserError, match=message):
        list(generate_tokens(model, prompt, 5, Sampling()))
    for name, bad in (("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("min_p", 2)):
        with pytest.raises(UserError, match=f"{name} = {bad}"):
            Sampling(**{name: bad})
