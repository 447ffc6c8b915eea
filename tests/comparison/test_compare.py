"""``bitnet compare``: scores against a direct computation, intervals that cover, bits in bytes, costs by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitnet.__main__ import main
from bitnet.checkpoint import load_checkpoint
from bitnet.comparison.compare import check_comparable, method_of, names_of
from bitnet.comparison.cost import cost_of
from bitnet.comparison.documents import Scores, read_documents, score_documents
from bitnet.comparison.stored import read_all, store
from bitnet.config import ModelConfig
from bitnet.data.corpora import Reading
from bitnet.data.tokenizer import find_eos, train_tokenizer
from bitnet.errors import UserError
from bitnet.estimate import count_parameters, flops_per_token
from bitnet.interchange.opened import Opened
from bitnet.model import Transformer
from bitnet.recipes import BitNet
from tests.commands.test_quantize import FLOAT
from tests.interchange.conftest import opened_model


@pytest.fixture(scope="module")
def float_run(stories: Path, tmp_path_factory: pytest.TempPathFactory, run_fit: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "float"
    run_fit(stories, folder, *FLOAT, "--trainer.max_steps=30", "--model.optim.lr=5e-3")
    return folder


def test_scores_are_those_of_a_direct_computation(float_run: Path, stories: Path) -> None:
    model, tokenizer = load_checkpoint(float_run)
    eos = find_eos(tokenizer)
    documents = read_documents(tokenizer, eos, str(stories), Reading(), limit=12)
    scores = score_documents(model, tokenizer, eos, documents, batch_size=5)
    texts = stories.read_text().split("\n<|endoftext|>\n")[:12]
    for number, text in enumerate(texts):
        ids = [eos, *tokenizer.encode(text).ids, eos]
        nats = 0.0
        for start in range(0, len(ids) - 1, 32):
            part = torch.tensor(ids[start : start + 33])
            with torch.inference_mode():
                logits = model(part[None, :-1])[0].double()
            nats += float(F.cross_entropy(logits, part[1:], reduction="sum"))
        assert scores.nats[number] == pytest.approx(nats, rel=1e-5)
        assert scores.tokens[number] == len(ids) - 1
        assert scores.text_bytes[number] == len(text.encode())
    total = scores.nats.sum() / math.log(2) / sum(len(t.encode()) for t in texts)
    assert scores.bits_per_byte == pytest.approx(total)


def scores_of(rng: np.random.Generator, n: int, shift: float = 0.0, hardness: np.ndarray | None = None) -> Scores:
    text_bytes = rng.integers(200, 2000, n).astype(float)
    hard = rng.normal(1.0, 0.2, n) if hardness is None else hardness
    rate = hard + rng.normal(shift, 0.01, n)
    return Scores(rate * text_bytes * math.log(2), text_bytes.astype(int), text_bytes)


def test_intervals_cover_what_they_should() -> None:
    """The true mean is 1; 95 % intervals of 200 samples of 100 documents."""
    rng = np.random.default_rng(0)
    inside = sum(low <= 1.0 <= high for low, high in (scores_of(rng, 100).interval() for _ in range(200)))
    assert 178 <= inside <= 200


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    hardness = rng.normal(1.0, 0.2, 100)
    text_bytes = rng.integers(200, 2000, 100).astype(float)
    one, two = (
        Scores((hardness + shift + rng.normal(0, 0.01, 100)) * text_bytes * math.log(2), text_bytes, text_bytes)
        for shift in (0.0, 0.02)
    )
    low, high = two.interval(minus=one)
    assert 0.01 < low < 0.02 < high < 0.03
    alone = two.interval()
    assert high - low < 0.2 * (alone[1] - alone[0])


def test_one_book_is_cut_into_pieces(float_run: Path, tmp_path: Path) -> None:
    _, tokenizer = load_checkpoint(float_run)
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"Line {i} of the book is like the others." for i in range(2000)), encoding="utf-8")
    documents = read_documents(tokenizer, find_eos(tokenizer), str(book), Reading(), None)
    assert 30 <= len(documents) <= 60
    assert sum(d.text_bytes for d in documents) == book.stat().st_size


@pytest.mark.parametrize("text", ["A line of its own.\n\n", " = Title = \n Words with spaces around. \n"])
def test_texts_without_a_newline_inside_of_a_paragraph_are_cut(text: str, float_run: Path, tmp_path: Path) -> None:
    """As WikiText has them, or a book with a line for each paragraph."""
    book = tmp_path / "book.txt"
    book.write_text(text * 2000)
    _, tokenizer = load_checkpoint(float_run)
    documents = read_documents(tokenizer, find_eos(tokenizer), str(book), Reading(), limit=None)
    assert len(documents) >= 20
    assert "".join(tokenizer.decode(d.ids[:-1]) for d in documents) == (text * 2000).rstrip("\n")


def test_a_float_model_is_stored_in_sixteen_bits(float_run: Path, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(float_run)
    stored, served = store(model, tokenizer, {}, tmp_path / "m.safetensors")
    assert stored.bits_per_parameter == 16.0 and not stored.is_packed
    assert stored.tensor_bytes == 2 * count_parameters(model.config).total
    state = read_all(tmp_path / "m.safetensors")
    weight = model.layers[0].attention.wq.weight
    assert torch.equal(state["layers.0.attention.wq.weight"], weight.bfloat16())
    assert torch.equal(served.layers[0].attention.wq.weight, weight.bfloat16().float())


def test_the_whole_report(float_run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (
        ("rtn4", ["--recipe", "rtn", "--bits", "4"]),
        ("gptq3", ["--recipe", "gptq", "--bits", "3", "--calibration", str(stories), "--calibration_rows", "8"]),
    ):
        assert main(["quantize", str(float_run), "--out", str(tmp_path / name), *options]) == 0
    capsys.readouterr()
    out = tmp_path / "report"
    models = [str(float_run), str(tmp_path / "rtn4"), str(tmp_path / "gptq3")]
    options = ["--data.path", str(stories), "--rounds", "1", "--tokens", "8", "--limit", "20", "--threads", "1"]
    assert main(["compare", *models, "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "RTN W4A16 g64" in printed and "report.html" in printed
    content = json.loads((out / "comparison.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["float", "rtn4", "gptq3"] and content["documents"] == 20
    assert rows["float"]["difference"] is None and rows["float"]["bits_per_parameter"] == 16.0
    # In 2 layers: four matrices of 64 inputs (wk, wv half as high: 2 of 4 heads) and three more, padded to 256 inputs.
    rows_of_weights = 2 * (64 + 32 + 32 + 64 + 64 + 64 + 64)
    config = load_checkpoint(float_run)[0].config
    counts = count_parameters(config)
    rest = 16 * counts.embeddings + 32 * counts.norms
    for name, bits in (("rtn4", 4), ("gptq3", 3)):
        expected = (rows_of_weights * (256 * bits + 16 + 8) + rest) / counts.total
        assert rows[name]["bits_per_parameter"] == pytest.approx(expected, rel=1e-6)
        low, high = rows[name]["interval"]
        assert low < rows[name]["bits_per_byte"] < high
        assert rows[name]["decode_tokens_per_s"] > 0 and rows[name]["memory_mb"] > 0
    tokens = 30 * 4 * 32
    assert rows["float"]["own"]["tokens"] == tokens and rows["float"]["parents"] is None
    assert rows["float"]["own"]["flops"] == tokens * flops_per_token(config, 32)
    assert rows["gptq3"]["own"]["tokens"] == 8 * 32 and rows["gptq3"]["parents"]["tokens"] == tokens
    html = (out / "report.html").read_text()
    assert html.count("<img") == 3 and html.count("<tr>") == 4 and "http" not in html.replace("http://www.w3.org", "")
    markdown = (out / "report.md").read_text()
    assert all((out / name).is_file() for name in ("quality_by_bits.svg", "quality_by_speed.svg"))
    assert "(quality_by_tokens.svg)" in markdown

    assert main(["compare", *models, "--out", str(out), *options]) == 2
    assert "exists already" in capsys.readouterr().err


def test_all_models_read_as_much_at_a_time(
    float_run: Path, stories: Path, tmp_path: Path, run_fit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """More context makes every next token easier to guess."""
    run_fit(stories, tmp_path / "short", "--data.seq_len=16", "--trainer.max_steps=1")
    models = [str(float_run), str(tmp_path / "short")]
    options = ["--data.path", str(stories), "--rounds", "1", "--tokens", "4", "--limit", "9", "--threads", "1"]
    assert main(["compare", *models, "--out", str(tmp_path / "out"), *options, "--seq_len", "17"]) == 2
    assert "seq_len = 17: the smallest context of these models holds 16 tokens" in capsys.readouterr().err
    assert main(["compare", *models, "--out", str(tmp_path / "out"), *options]) == 0
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["settings"]["seq_len"] == 16
    assert "read 16 tokens at a time" in (tmp_path / "out" / "report.md").read_text()
    model, tokenizer = load_checkpoint(float_run)
    documents = read_documents(tokenizer, find_eos(tokenizer), str(stories), Reading(), 9)
    with torch.inference_mode():
        alone = score_documents(store(model, tokenizer, {}, tmp_path / "m.safetensors")[1], tokenizer,
                                find_eos(tokenizer), documents, seq_len=16)  # fmt: skip
    assert content["rows"][0]["bits_per_byte"] == pytest.approx(alone.bits_per_byte)


def test_models_of_two_tokenizers_are_refused() -> None:
    one, two = opened_model(), opened_model()
    check_comparable([("a", one), ("b", two)])
    other = Opened(model=two.model, tokenizer=train_tokenizer(["other words altogether " * 9], 280))
    with pytest.raises(UserError, match="b: its tokenizer is not that of a"):
        check_comparable([("a", one), ("b", other)])


def test_float_weights_with_quantized_activations_are_refused(tiny_config: ModelConfig) -> None:
    """They would be stored, and served, without the quantizers they were trained with."""
    model = Transformer(tiny_config)
    BitNet(weight="none", act_bits=8).prepare(model)
    odd = Opened(model=model, tokenizer=opened_model().tokenizer)
    with pytest.raises(UserError, match="b: has float weights with quantized activations"):
        check_comparable([("a", opened_model()), ("b", odd)])


def test_costs_follow_the_parents(float_run: Path, tmp_path: Path) -> None:
    config = load_checkpoint(float_run)[0].config
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    for folder, parent, taught in ((child, float_run, 0), (grandchild, child, 100)):
        folder.mkdir()
        origin = {"parent": str(parent), "seconds": 2.5, "calibration_tokens": 1000, "block_tokens": taught}
        (folder / "origin.json").write_text(json.dumps(origin))
    found = cost_of(grandchild, config)
    assert found is not None
    own, inherited = found
    forward = flops_per_token(config, 512, training=False)
    assert own.tokens == 1100 and own.seconds == 2.5 and own.flops == forward * (1000 + 300)
    assert inherited.tokens == 1000 + 30 * 4 * 32
    assert cost_of(tmp_path / "nowhere", config) is None


def test_names_and_methods() -> None:
    assert names_of(["a/x", "b/x", "b/y"]) == ["a/x", "b/x", "b/y"] and names_of(["a/x", "b/z"]) == ["x", "z"]
    with pytest.raises(UserError, match="named twice"):
        names_of(["a", "a"])
    assert method_of({"name": "BitNet", "weight": "ternary", "act_bits": 8}) == "W1.58A8"
    assert method_of({"name": "BitNet", "weight": "none", "act_bits": "none"}) == "float"
    assert method_of({"name": "GPTQ", "bits": 3, "group_size": 64, "activation_bits": "none"}) == "GPTQ W3A16 g64"
    assert method_of({"name": "SmoothQuant", "bits": 8, "group_size": 0, "activation_bits": 8, "level": "o2"}) == (
        "SmoothQuant O2 W8A8"
    )
