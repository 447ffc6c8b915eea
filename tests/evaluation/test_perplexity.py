"""Perplexity by windows, against a sum over single predictions."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from bitnet.__main__ import main
from bitnet.data.corpora import Reading
from bitnet.errors import UserError
from bitnet.evaluation import perplexity
from bitnet.evaluation.perplexity import evaluate_text, windows
from bitnet.interchange.opened import open_model
from bitnet.loss import Score
from tests.conftest import story_text

TEXT = "The small dog ran over the green hill and sat down beside the river. " * 12


def test_every_id_but_the_first_is_a_target_once() -> None:
    for n in (2, 5, 16, 17, 18, 40):
        for seq_len, stride in ((16, 16), (16, 4), (16, 5), (16, 1), (3, 2)):
            batches = list(windows(np.arange(100, 100 + n), seq_len, stride, batch_size=3))
            targets = torch.cat([b["targets"].flatten() for b in batches])
            assert sorted(targets[targets >= 0].tolist()) == list(range(101, 100 + n)), (n, seq_len, stride)


@pytest.mark.parametrize("stride", [None, 8, 3])
def test_windows_against_single_predictions(stride, finished_run, tmp_path) -> None:
    """Each token from exactly the context that its window gives it, in float64."""
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    opened = open_model(finished_run)
    seq_len, step = 32, stride or 32
    found = evaluate_text(opened.model, opened.tokenizer, str(file), Reading(), stride=stride)
    ids = [*opened.tokenizer.encode(TEXT).ids, opened.eos_id]
    total, done = 0.0, 0
    for start in range(0, len(ids), step):
        for at in range(max(done, start) + 1, min(start + seq_len, len(ids) - 1) + 1):
            with torch.inference_mode():
                logits = opened.model(torch.tensor([ids[start:at]]))[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[at]])
            done = at
    assert found.score.tokens == done == len(ids) - 1
    assert found.score.loss == pytest.approx(total / done, rel=1e-5)


def test_a_smaller_stride_gives_more_context(finished_run, tmp_path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    opened = open_model(finished_run)
    far, near = (evaluate_text(opened.model, opened.tokenizer, str(file), Reading(), stride=s) for s in (None, 4))
    assert near.score.tokens == far.score.tokens
    assert near.score.loss != far.score.loss


def test_limit_scores_the_first_windows_and_their_bytes(finished_run, tmp_path, capsys) -> None:
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    command = ["evaluate", str(finished_run), "--data.path", str(file), "--limit", "2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 64
    opened = open_model(finished_run)
    said = opened.tokenizer.decode(opened.tokenizer.encode(TEXT).ids[1:65])
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 64 / math.log(2) / len(said.encode()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride = 0"),
        ({"stride": 33}, "stride = 33"),
        ({"limit": 0}, "limit = 0"),
        ({"batch_size": -3}, "batch_size = -3"),
        ({"seq_len": 99}, "seq_len = 99"),
    ],
)
def test_bad_windows_are_refused(options, words, finished_run, tmp_path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    opened = open_model(finished_run)
    with pytest.raises(UserError, match=words):
        evaluate_text(opened.model, opened.tokenizer, str(file), Reading(), **options)


def test_a_model_of_nan_has_no_score(finished_run, tmp_path, capsys) -> None:
    """Where JSON has no number to print."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    file = run / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["model.norm.weight"].fill_(torch.nan)
    torch.save(content, file)
    text = tmp_path / "text.txt"
    text.write_text(story_text(12))
    for command in (["evaluate", str(run)], ["compare", str(run), "--out", str(tmp_path / "report")]):
        capsys.readouterr()
        assert main([*command, "--data.path", str(text)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the logits of this model are nan or infinite" in error
    assert error.startswith("error: run: ") and not (tmp_path / "report").exists()


def test_batches_are_where_the_model_is(finished_run, tmp_path, monkeypatch) -> None:
    """No GPU is needed to see that: a model on the meta device, and nothing computed."""
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    opened, places = open_model(finished_run), set()

    def look(model: torch.nn.Module, batch: dict[str, torch.Tensor], lengths: torch.Tensor) -> Score:
        places.update(tensor.device.type for tensor in (*batch.values(), lengths))
        return Score()

    monkeypatch.setattr(perplexity, "score_batch", look)
    evaluate_text(opened.model.to("meta"), opened.tokenizer, str(file), Reading())
    assert places == {"meta"}
