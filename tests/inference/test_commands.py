"""The commands around packed models, as a user types them."""

import json
from pathlib import Path

import pytest

from bitnet import generate as generate_text
from bitnet import load_packed
from bitnet.__main__ import main


@pytest.fixture(scope="module")
def packed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "tiny.safetensors"
    assert main(["pack", str(finished_run), "--out", str(file)]) == 0
    return file


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_pack_says_what_it_wrote(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for format in ("ternary2", "ternary_base3"):
        file = tmp_path / f"{format}.safetensors"
        assert main(["pack", str(finished_run), "--format", format, "--head", "int8", "--out", str(file)]) == 0
        printed = capsys.readouterr().out
        assert f"packed weights ({format})" in printed
        assert "embedding and head (int8, tied)" in printed
        sizes[format] = file.stat().st_size
    assert sizes["ternary_base3"] < sizes["ternary2"]


def test_text_of_run_and_packed_file_is_the_same(
    finished_run: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "The small", "--max_new_tokens", "20", "--temperature", "0"]
    texts = []
    for path, more in ((finished_run, []), (packed, []), (packed, ["--stream"]), (packed, ["--threads", "1"])):
        assert main(["generate", str(path), *options, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].startswith("The small")
    model, tokenizer = load_packed(packed)
    continued = generate_text(model, tokenizer, "The small", max_new_tokens=20, temperature=0.0)
    assert f"The small{continued}\n" == texts[0]


def test_several_prompts_and_stop_strings(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", str(packed), "--max_new_tokens", "12", "--temperature", "0"]
    assert main([*options, "--prompt", "The small dog", "--prompt", "A"]) == 0
    together = capsys.readouterr().out
    alone = []
    for prompt in ("The small dog", "A"):
        assert main([*options, "--prompt", prompt]) == 0
        alone.append(capsys.readouterr().out)
    assert together == "".join(alone)
    stop = alone[0][len("The small dog") + 2 : len("The small dog") + 4]
    assert main([*options, "--prompt", "The small dog", "--stop", stop]) == 0
    shown = capsys.readouterr().out
    assert shown == alone[0][: alone[0].index(stop, len("The small dog"))] + "\n"


def test_a_packed_model_is_evaluated_like_its_run(
    finished_run: Path, packed: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for path in (finished_run, packed):
        assert main(["evaluate", str(path), "--data.path", str(stories), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]


def test_bench_decode_of_a_file_and_of_a_config(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "d.json", tmp_path / "d.png"
    for model in (str(packed), "overlays/smoke"):
        options = ["--threads", "1,2", "--tokens", "4", "--prompt_tokens", "6", "--json", str(out), "--plot", str(plot)]
        assert main(["bench", "decode", model, *options]) == 0
        content = json.loads(out.read_text())
        assert list(content["threads"]) == ["1", "2"]
        for figures in content["threads"].values():
            assert figures["decode_tokens_per_s"] > 0
            assert figures["prefill_tokens_per_s"] > 0
            assert 50 < figures["rss_after_import_mb"] <= figures["peak_rss_mb"] < 2000
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert "decode tok/s" in capsys.readouterr().out


def test_bad_input(finished_run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = str(finished_run), str(packed)
    out = str(tmp_path / "x.safetensors")
    for command, message in (
        (("pack", run, "--out", str(tmp_path / "x.bin")), "must end in .safetensors"),
        (("pack", run, "--out", str(tmp_path / "no" / "x.safetensors")), "does not exist"),
        (("pack", run, "--format", "binary1", "--out", out), "use ternary2"),
        (("pack", run, "--format", "q4", "--out", out), "invalid choice: 'q4'"),
        (("pack", str(tmp_path), "--out", out), "checkpoints/last.ckpt"),
        (("generate", file, "--prompt", "a", "--prompt", "b", "--stream"), "give one --prompt"),
        (("generate", file, "--prompt", "a", "--top_p", "0"), "top_p = 0"),
        (("generate", file, "--prompt", "a", "--repetition_penalty", "-1"), "repetition_penalty = -1"),
        (("generate", file, "--prompt", ""), "the prompt is empty"),
        (("generate", str(tmp_path / "absent.safetensors"), "--prompt", "a"), "no such run, checkpoint, packed model"),
        (("inspect", run, "--verify"), "--verify checks the digests of a packed model"),
        (("inspect", run, "--json", "x.json"), "--json goes with --devices"),
        (("inspect", file, "--int8"), "--int8 goes with --devices"),
        (("bench", "decode", run), "pack it first"),
        (("bench", "decode", file, "--tokens", "5000"), "the context of the model holds 32"),
        (("bench", "decode", "float_125m"), "ternary or binary ones can be packed"),
        (("bench", "decode", file, "--head", "int8"), "has a head of its own; leave it out"),
        (("bench", "decode", file, "--device", "tpu"), "--device tpu: must be cpu"),
        (("generate", file, "--prompt", "a", "--device", "tpu"), "--device tpu: must be cpu"),
        (("bench", "decode", file, "--json", str(tmp_path / "no" / "x.json")), "does not exist"),
        (("bench", "kernels", "--plot", str(tmp_path / "x.bmp")), "must end in .png or .svg"),
        (("bench", "decode", file, "--tokns", "3"), "Did you mean '--tokens'?"),
        (("bench", "kernls"), "invalid choice: 'kernls'"),
    ):
        assert message in error_of(capsys, *command), command
    assert list(tmp_path.iterdir()) == []


def test_options_may_not_be_abbreviated(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new option must not change what an old command line means."""
    assert "unknown option --max_new. Did you mean '--max_new_tokens'?" in error_of(
        capsys, "generate", str(packed), "--prompt", "The", "--max_new", "3"
    )
