"""GGUF files in a real llama.cpp: the graph, the ternary types, the tokens, and every known trap."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from bitnet.__main__ import main
from bitnet.errors import UserError
from bitnet.interchange import check, gguf_export, read_by_ik_llama_cpp
from bitnet.interchange.check import (
    BLOCK_ACTIVATIONS,
    HALF,
    SAME_GRAPH,
    bound_of_gguf,
    check_gguf,
    check_gguf_in_ik,
    own_texts,
)
from bitnet.interchange.gguf_blocks import (
    i2_s,
    interleave_rows,
    q2_0,
    separate_rows,
)
from bitnet.interchange.gguf_export import architecture, check_type, write_gguf
from bitnet.interchange.gguf_import import read_gguf
from bitnet.interchange.gguf_tokenizer import read_tokenizer
from bitnet.interchange.opened import Opened, open_model
from bitnet.interchange.parts import matrices, without_activation_quantization

from .conftest import TEXT, opened_model


def written(opened: Opened, file: Path, kind: str) -> Path:
    check_type(opened.model, kind)
    write_gguf(
        file,
        opened.model,
        opened.tokenizer,
        kind=kind,
        name="test",
        eos_id=opened.eos_id,
        chat_template=opened.chat_template,
    )
    return file


def test_q2_0_by_hand() -> None:
    """Codes 1 + w of four neighbours in one byte, lowest bits first, after a float16 scale."""
    levels = np.zeros((1, 64), np.int8)
    levels[0, :5] = [1, -1, 0, 1, -1]
    data = q2_0(levels, 0.5)
    assert data.shape == (1, 18)
    assert data[0, :2].view(np.float16)[0] == 0.5
    assert data[0, 2] == 2 | 0 << 2 | 1 << 4 | 2 << 6
    assert data[0, 3] == 0 | 1 << 2 | 1 << 4 | 1 << 6
    assert data[0, 4] == 1 | 1 << 2 | 1 << 4 | 1 << 6


def test_i2_s_by_hand() -> None:
    """Byte j holds weights j, j + 32, j + 64 and j + 96, highest bits first; the scale comes once, at the end."""
    levels = np.zeros((2, 128), np.int8)
    levels[1, [3, 35, 67, 99]] = [1, -1, 0, 1]
    data = i2_s(levels, 0.25)
    assert data.shape == (2 * 32 + 32,)
    assert data[32 + 3] == 2 << 6 | 0 << 4 | 1 << 2 | 2
    assert data[64:68].view(np.float32)[0] == 0.25 and not data[68:].any()
    assert data[0] == 1 << 6 | 1 << 4 | 1 << 2 | 1


def test_rows_of_heads_are_interleaved_as_llama_cpp_wants() -> None:
    """Two heads of four rows: halves (0 1 | 2 3) become neighbours (0 2 1 3)."""
    w = np.arange(8)[:, None]
    assert interleave_rows(w, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(separate_rows(interleave_rows(w, 2), 2), w)


GRAPHS = [
    {"sub_norm": True},
    {"sub_norm": True, "rope_theta": 300_000.0, "n_kv_heads": 4},
    {"sub_norm": False, "scale_per": 64},
    {"sub_norm": False, "tie_embeddings": False, "n_kv_heads": 1, "ffn_dim": 512},
]


@pytest.mark.parametrize("graph", GRAPHS, ids=["bitnet", "bitnet-rope", "llama-groups", "llama-untied"])
def test_float_file_has_the_same_graph(graph, tmp_path) -> None:
    opened = opened_model(**graph)
    report = check_gguf(opened, written(opened, tmp_path / "m.gguf", "f32"), bound_of_gguf("f32"), 40)
    assert report.bound is SAME_GRAPH
    assert report.comparison is not None and report.problems == []


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "q2_0", "f16"])
def test_types_of_a_trained_model_meet_their_bounds(kind, trained_model, tmp_path) -> None:
    bound = bound_of_gguf(kind)
    assert bound is (HALF if kind == "f16" else BLOCK_ACTIVATIONS)
    report = check_gguf(trained_model, written(trained_model, tmp_path / "m.gguf", kind), bound, 64)
    assert report.comparison is not None and report.problems == []


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0"])
def test_levels_in_the_file_are_those_that_were_trained(kind, weight, tmp_path) -> None:
    opened = opened_model(weight=weight, sub_norm=False)
    back = read_gguf(written(opened, tmp_path / "m.gguf", kind))
    assert back.recipe["weight"] == "ternary"
    for mine, theirs in zip(matrices(opened.model), matrices(back.model), strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.levels, theirs.levels)
        scale = (1 / mine.inv_scale).half().float()  # the file has float16 scales
        assert torch.equal(theirs.inv_scale, 1 / scale)


def test_a_wrong_permutation_is_caught(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gguf_export, "interleave_rows", lambda w, heads: w)
    opened = opened_model(sub_norm=False)
    assert check_gguf(opened, written(opened, tmp_path / "m.gguf", "f32"), SAME_GRAPH, 40).problems


def test_a_scale_computed_again_is_caught(monkeypatch, trained_model, tmp_path) -> None:
    real = gguf_export._add_matrix

    def again(writer, matrix, kind, heads) -> None:
        nonzero = matrix.levels.count_nonzero() / matrix.levels.numel()
        matrix.inv_scale.div_(nonzero)
        real(writer, matrix, kind, heads)
        matrix.inv_scale.mul_(nonzero)

    monkeypatch.setattr(gguf_export, "_add_matrix", again)
    opened = opened_model()
    assert check_gguf(opened, written(opened, tmp_path / "m.gguf", "tq2_0"), BLOCK_ACTIVATIONS, 40).problems


def test_relu2_under_the_silu_graph_is_caught_and_never_written(monkeypatch, tmp_path) -> None:
    opened = opened_model(activation="relu2")
    with pytest.raises(UserError, match=r"compute silu, silently wrong. ik_llama.cpp"):
        check_type(opened.model, "tq2_0")
    assert architecture(opened.model.config, "f32") == "bitnet-b1.58"
    monkeypatch.setattr(gguf_export, "architecture", lambda config, kind: "bitnet")
    file = tmp_path / "m.gguf"
    write_gguf(file, opened.model, opened.tokenizer, kind="f32", name="t", eos_id=0, chat_template=None)
    assert check_gguf(opened, file, SAME_GRAPH, 40).problems


def test_llama_cpp_does_not_know_the_relu2_architecture(tmp_path) -> None:
    opened = opened_model(activation="relu2")
    with pytest.raises(UserError, match=r"llama.cpp could not read it"):
        check_gguf(opened, written(opened, tmp_path / "m.gguf", "f32"), SAME_GRAPH, 8)


@pytest.mark.parametrize(
    ("sizes", "kind", "words"),
    [
        ({"sub_norm": False, "activation": "relu2"}, "f32", "no GGUF program has this graph"),
        ({"tie_embeddings": False}, "f32", "untied head"),
        ({"ffn_dim": 320}, "tq2_0", "ffn_dim = 320 is not a multiple of 256"),
        ({"dim": 96, "ffn_dim": 96}, "q2_0", "dim = 96 is not a multiple of 64"),
        ({"weight": "none", "act_bits": "none"}, "tq1_0", "this model has float ones"),
        ({"scale_per": "row"}, "tq2_0", "a scale for each row, and low-bit exports take one"),
    ],
)
def test_what_cannot_be_held_is_refused(sizes, kind, words) -> None:
    with pytest.raises(UserError, match=words):
        check_type(opened_model(**sizes).model, kind)


def random_texts(n: int) -> list[str]:
    """Text of all planes of Unicode, spaces and line ends among it."""
    rng = random.Random(0)
    ranges = [(32, 126), (9, 13), (160, 0x24F), (0x370, 0x52F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0x600, 0x6FF)]
    common = [" ", "  ", "\n", "'s", "'ll", "12", " 3", ".", "the", " dog", "<|endoftext|>"]

    def piece() -> str:
        if rng.random() < 0.4:
            return rng.choice(common)
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4)))

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(n)]


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens_of_a_thousand_random_texts_are_equal(split, monkeypatch, tmp_path) -> None:
    opened = opened_model(split=split, sub_norm=False)
    monkeypatch.setattr(check, "TEXTS", (*random_texts(1000), *TEXT))
    report = check_gguf(opened, written(opened, tmp_path / "m.gguf", "f16"), HALF, 2)
    assert [p for p in report.problems if "tokens" in p] == []


def test_another_split_is_caught(monkeypatch, tmp_path) -> None:
    from bitnet.interchange import gguf_tokenizer

    opened = opened_model(split="smollm", sub_norm=False)
    monkeypatch.setattr(gguf_tokenizer, "split_name", lambda content: "gpt-2")
    monkeypatch.setattr(check, "TEXTS", tuple(random_texts(300)))
    report = check_gguf(opened, written(opened, tmp_path / "m.gguf", "f16"), HALF, 2)
    assert any("other tokens" in p for p in report.problems)


def test_the_tokenizer_comes_back(trained_model, tmp_path) -> None:
    file = written(trained_model, tmp_path / "m.gguf", "f16")
    back = read_gguf(file)
    for text in (*random_texts(100), *TEXT):
        assert back.tokenizer.encode(text).ids == trained_model.tokenizer.encode(text).ids
    assert back.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("said,begins", [(None, True), (True, True), (False, False)])
def test_texts_of_llama_3_begin_with_a_token_unless_the_file_says_no(said, begins) -> None:
    """llama.cpp's rule for this split, where ``add_bos_token`` is missing."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    fields = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [1] * 256 + [3, 3], "merges": []}
    fields |= {"bos_token_id": 256, "eos_token_id": 257} | ({} if said is None else {"add_bos_token": said})
    tokenizer, eos = read_tokenizer(fields, "m.gguf")
    assert (tokenizer.encode("a").ids[0] == 256) == begins and eos == "</s>"
    assert read_tokenizer({**fields, "pre": "qwen2"}, "m.gguf")[0].encode("a").ids[0] == (256 if said else 64)


def test_without_the_gguf_package_both_ways_say_so(trained, monkeypatch, tmp_path, capsys) -> None:
    file = written(opened_model(), tmp_path / "m.gguf", "f16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for command in (
        ["export", str(trained), "--format", "gguf", "--out", str(tmp_path / "n.gguf"), "--type", "f16"],
        ["generate", str(file), "--prompt", "a"],
    ):
        assert main(command) == 2
        assert "GGUF files need the package gguf (pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_exports_and_imports(trained, tmp_path, capsys) -> None:
    out, run = tmp_path / "m.gguf", tmp_path / "run"
    assert main(["export", str(trained), "--format", "gguf", "--out", str(out), "--check_tokens", "16"]) == 0
    assert "KL < 0.001, argmax >= 90%: met" in capsys.readouterr().out
    assert main(["import", str(out), "--out", str(run), "--check_tokens", "16"]) == 0
    assert "ternary weights, 8-bit activations" in capsys.readouterr().out
    assert json.loads((run / "origin.json").read_text())["types"] == "TQ2_0 (14 matrices)"
    assert main(["generate", str(run), "--prompt", "The", "--max_new_tokens", "5", "--temperature", "0"]) == 0
    assert main(["export", str(trained), "--format", "gguf", "--out", str(tmp_path / "m.bin")]) == 2
    assert "must end in .gguf" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["f32", "i2_s"])
def test_relu2_in_ik_llama_cpp(kind, tmp_path) -> None:
    """The graph of BitNet 2B4T: logits of the F32 file; I2_S turned into IQ2_BN gives what F32 turned into it gives."""
    pytest.importorskip("ik_llama_cpp")
    opened = opened_model(activation="relu2", dim=512, ffn_dim=512, n_heads=8, init_std=0.02)
    report = check_gguf_in_ik(opened, written(opened, tmp_path / "m.gguf", kind), kind, 100)
    assert report.comparison is not None and report.problems == []


def test_i2_s_is_read_as_the_float_file_is(tmp_path) -> None:
    pytest.importorskip("ik_llama_cpp")
    opened = opened_model(activation="relu2", dim=512, ffn_dim=512, n_heads=8)
    ids = own_texts(opened, 30)
    found = []
    for kind in ("f32", "i2_s"):
        request = {"ids": ids, "vocab_size": 300, "texts": (), "threads": 1, "requantize": "IQ2_BN"}
        file = written(opened, tmp_path / f"{kind}.gguf", kind)
        found.append(check._run(read_by_ik_llama_cpp, file, request, "ik_llama.cpp")["logits"])
    assert np.array_equal(*found)


def test_a_relu2_export_says_when_nobody_checked_it(monkeypatch, tmp_path, capsys) -> None:
    from bitnet.interchange.exporting import export_gguf

    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    export_gguf(opened_model(activation="relu2"), tmp_path / "m.gguf", kind="i2_s", check_tokens=8)
    assert "not done: ik_llama.cpp, which has this graph, is not installed" in capsys.readouterr().out


def test_float_import_equals_what_was_exported(tmp_path) -> None:
    opened = opened_model(sub_norm=False, tie_embeddings=False)
    back = open_model(written(opened, tmp_path / "m.gguf", "f32"))
    ids = torch.randint(0, 300, (1, 30))
    with torch.inference_mode():
        assert torch.equal(back.model(ids), without_activation_quantization(opened.model)(ids))


@pytest.mark.parametrize("kind", ["q2_0", "i2_s"])
def test_types_that_cannot_be_read_back_say_so(kind, tmp_path) -> None:
    with pytest.raises(UserError, match="such as q2_0 or i2_s"):
        read_gguf(written(opened_model(), tmp_path / "m.gguf", kind))


def test_damaged_files_are_one_line(tmp_path) -> None:
    """300 files with flipped bytes in their keys: read as they are, or refused in one line."""
    whole = written(opened_model(), tmp_path / "m.gguf", "tq2_0").read_bytes()
    rng = random.Random(0)
    file = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            content[rng.randrange(rng.choice((64, 1200, 8000)))] = rng.randrange(256)
        file.write_bytes(content)
        try:
            read_gguf(file)
        except UserError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(64), b"not a model" * 50])
def test_files_that_are_none_are_refused(content, tmp_path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not a GGUF file that can be read"):
        read_gguf(file)
