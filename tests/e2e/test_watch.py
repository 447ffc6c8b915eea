"""A run that breaks stops with one line, keeps what broke it, and leaves its last good checkpoint alone."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitnet.__main__ import main as bitnet
from bitnet.checkpoint import read_checkpoint
from bitnet.errors import UserError
from bitnet.training import watch
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet
from bitnet.training.replay import read_incident, replay
from bitnet.training.watch import Watch, broken, robust

from ..conftest import tiny_options
from ..runs import run_python

ONE_SAVE = (
    '--trainer.callbacks=[{"class_path":"bitnet.training.callbacks.LastCheckpoint","init_args":'
    '{"every_n_train_steps":%d}}]'
)


def disturb(monkeypatch: pytest.MonkeyPatch, at: dict[int, float]) -> None:
    """Multiply the loss of these steps (counted from 1) by these numbers."""
    original = LitBitNet.training_step

    def training_step(self, batch, batch_idx):
        return original(self, batch, batch_idx) * at.get(self.global_step + 1, 1.0)

    monkeypatch.setattr(LitBitNet, "training_step", training_step)


@pytest.mark.parametrize("factor,said", [(float("nan"), "the loss is nan"), (float("inf"), "the loss is inf")])
def test_a_loss_that_is_not_finite_ends_the_run(stories, tmp_path, monkeypatch, capsys, factor, said) -> None:
    run = tmp_path / "run"
    disturb(monkeypatch, {8: factor})
    assert fit([*tiny_options(stories, run), ONE_SAVE % 5]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    file, last = run / "incidents" / "step_8.pt", run / "checkpoints" / "last.ckpt"
    assert len(lines) == 1 and lines[0].startswith(f"error: step 8: {said}")
    assert f"replay {file}" in lines[0] and f"{last} is from before" in lines[0]
    content = read_checkpoint(run)
    assert content["global_step"] == 5 and all(t.isfinite().all() for t in content["state_dict"].values())
    assert [f.name for f in (run / "incidents").iterdir()] == ["step_8.pt"]
    assert not any((run / "checkpoints").glob(".*"))
    incident = torch.load(file, weights_only=True)
    assert incident["step"] == 8 and not torch.tensor(incident["loss"]).isfinite()
    # The batch of the eighth step, and the state of the loader behind it.
    monkeypatch.undo()
    assert fit([*tiny_options(stories, run), ONE_SAVE % 5, "--ckpt_path=last"]) == 0
    assert read_checkpoint(run)["global_step"] == 12


def test_files_are_kept_by_age_and_not_by_step(stories, tmp_path, monkeypatch, run_fit, capsys) -> None:
    """A run that went on from an older checkpoint may have left files of higher steps."""
    run = tmp_path / "run"
    run_fit(stories, run, "--trainer.max_steps=4")
    (run / "incidents").mkdir(exist_ok=True)
    for step in range(900, 905):
        (run / "incidents" / f"step_{step}.pt").write_bytes(b"old")
        os.utime(run / "incidents" / f"step_{step}.pt", (step, step))
    disturb(monkeypatch, {8: float("nan")})
    assert fit([*tiny_options(stories, run), "--ckpt_path=last"]) == 2
    assert {f.name for f in (run / "incidents").iterdir()} == {"step_8.pt", *(f"step_90{n}.pt" for n in range(1, 5))}


def test_the_saved_batch_is_the_one_that_broke_it(stories, tmp_path, monkeypatch, capsys) -> None:
    """A run that resumes before the incident sees the batch again; so do a stream and a window of accumulation."""
    seen: dict[int, list[torch.Tensor]] = {}
    original = LitBitNet.training_step

    def training_step(self, batch, batch_idx):
        seen.setdefault(self.global_step + 1, []).append(batch["inputs"])
        return original(self, batch, batch_idx)

    options = ["--data.streaming=true", "--data.stream_val_bytes=2000", "--trainer.accumulate_grad_batches=3"]
    monkeypatch.setattr(LitBitNet, "training_step", training_step)
    assert fit([*tiny_options(stories, tmp_path / "whole"), *options]) == 0
    monkeypatch.undo()
    disturb(monkeypatch, {6: float("nan")})
    assert fit([*tiny_options(stories, tmp_path / "run"), *options]) == 2
    incident = read_incident(tmp_path / "run" / "incidents" / "step_6.pt")
    assert len(incident["batches"]) == len(incident["random_states"]) == 3
    for kept, trained in zip(incident["batches"], seen[6], strict=True):
        assert torch.equal(kept["inputs"], trained)


def test_a_gradient_that_is_not_finite_ends_the_run(stories, tmp_path, monkeypatch, capsys) -> None:
    """The loss of that step is still fine, and nothing of it is saved: the weights behind it are not."""

    def poison(self, *args):
        if self.global_step + 1 == 4:
            next(self.parameters()).grad.view(-1)[0] = float("inf")

    monkeypatch.setattr(LitBitNet, "on_after_backward", poison)
    run = tmp_path / "run"
    assert fit(tiny_options(stories, run)) == 2
    assert "step 4: the gradient norm is inf" in capsys.readouterr().err
    assert read_checkpoint(run)["global_step"] == 3
    assert torch.tensor(read_incident(run / "incidents" / "step_4.pt")["loss"]).isfinite()


def test_the_random_state_is_that_of_the_step_also_right_after_a_resume(stories, tmp_path, monkeypatch, capsys) -> None:
    """With a Watch of the config's own, which Lightning calls before our callbacks."""
    own = (
        '--trainer.callbacks=[{"class_path":"bitnet.training.watch.Watch"},'
        '{"class_path":"bitnet.training.callbacks.LastCheckpoint","init_args":{"every_n_train_steps":1}}]'
    )
    disturb(monkeypatch, {7: float("nan")})
    states = []
    for resume in ([], ["--ckpt_path=last"]):
        assert fit([*tiny_options(stories, tmp_path / "run"), own, *resume]) == 2
        states.append(read_incident(tmp_path / "run" / "incidents" / "step_7.pt")["random_states"][0])
    assert torch.equal(states[0]["torch"], states[1]["torch"]) and states[0]["python"] == states[1]["python"]


def test_without_a_checkpoint_the_line_says_so(stories, tmp_path, monkeypatch, capsys) -> None:
    disturb(monkeypatch, {2: float("nan")})
    assert fit([*tiny_options(stories, tmp_path / "run"), ONE_SAVE % 5]) == 2
    assert "no checkpoint had been saved yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert bitnet(["replay", str(tmp_path / "run" / "incidents" / "step_2.pt")]) == 2
    assert "holds no checkpoints/last.ckpt" in capsys.readouterr().err


def test_figures_that_are_looked_at_late_still_save_nothing_broken(stories, tmp_path, monkeypatch, capsys) -> None:
    """As on a GPU, where a step is looked at when the next is queued: saves, validations and the end look first."""
    monkeypatch.setitem(watch.LAG, "cpu", 1)
    for run, step, saved in (
        (tmp_path / "save", 8, 4),
        (tmp_path / "validation", 6, 4),
        (tmp_path / "between", 7, 4),
        (tmp_path / "end", 12, 8),
    ):
        with monkeypatch.context() as patched:
            disturb(patched, {step: float("nan")})
            assert fit([*tiny_options(stories, run), ONE_SAVE % 4]) == 2
        assert f"step {step}: the loss is nan" in capsys.readouterr().err
        assert read_checkpoint(run)["global_step"] == saved
        assert [f.name for f in (run / "incidents").iterdir()] == [f"step_{step}.pt"]


def spikes_of(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return (
        {e.step: e.value for e in events.Scalars("watch/spikes")} if "watch/spikes" in events.Tags()["scalars"] else {}
    )


def test_spikes_are_kept_counted_and_survived(stories, tmp_path, monkeypatch, capsys) -> None:
    """Within the first 50 steps nothing is a spike; behind them the newest two of three are kept, also over a stop."""
    options = [
        *tiny_options(stories, tmp_path / "run"),
        "--trainer.max_steps=70",
        "--trainer.val_check_interval=1000",
        '--trainer.callbacks=[{"class_path":"bitnet.training.watch.Watch","init_args":{"keep":2,"window":40}}]',
    ]
    disturb(monkeypatch, {45: 5.0, 55: 5.0, 60: 4.0, 66: 6.0})
    assert fit(options) == 0
    assert spikes_of(tmp_path / "run") == {55: 1.0, 60: 2.0, 66: 3.0}
    assert sorted(f.name for f in (tmp_path / "run" / "incidents").iterdir()) == ["step_60.pt", "step_66.pt"]
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"step 60: loss [\d.]+ is [\d.]+ deviations above the median [\d.]+ of 40 steps; batch saved in", out
    )
    assert out.count("deviations above the median") == 3
    state = read_checkpoint(tmp_path / "run")["callbacks"]["Watch"]
    assert state["spikes"] == 3 and len(state["losses"]) == 40


REPLAYED = (
    "--trainer.accumulate_grad_batches=2",
    "--model.arithmetic.input_gradient=int8",  # these gradients are a hundredth off those of floats
    "--model.arithmetic.weight_gradient=int8",
)


def test_replay_finds_the_loss_and_gradient_of_the_run(stories, tmp_path, monkeypatch, capsys) -> None:
    """With the weights of the step before, dropout included, bit for bit on one thread of a CPU."""
    run = tmp_path / "run"
    monkeypatch.setattr(watch, "FIRST_STEPS", 4)
    monkeypatch.setattr(watch, "robust", lambda losses: (0.0, 1e-3))  # every loss is a spike
    assert fit([*tiny_options(stories, run), *REPLAYED, ONE_SAVE % 8]) == 0
    last = run / "checkpoints" / "last.ckpt"
    monkeypatch.undo()
    file = run / "incidents" / "step_12.pt"
    incident = read_incident(file)
    _stop_at_eleven(stories, tmp_path / "eleven", monkeypatch)
    found = replay(file, tmp_path / "eleven")
    assert found.checkpoint_step == 11
    assert found.loss == incident["loss"]
    assert found.grad_norm == pytest.approx(incident["grad_norm"], rel=1e-6)  # summed by layer, in float64
    assert [g for _, g, _ in found.gradients] == sorted((g for _, g, _ in found.gradients), reverse=True)
    assert sum(g**2 for _, g, _ in found.gradients) == pytest.approx(found.grad_norm**2)
    assert len(found.rows) == 8 and found.rows[0].loss >= found.rows[-1].loss and found.first_broken == ""
    newest = replay(file)
    assert newest.checkpoint == last and newest.loss != incident["loss"]

    capsys.readouterr()
    assert bitnet(["replay", str(file), "--checkpoint", str(tmp_path / "eleven"), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "the very weights of that step" in out and f"loss          {incident['loss']:.6f} (in the run" in out
    assert found.gradients[0][0] in out and found.gradients[3][0] not in out
    text = " ".join(found.rows[0].text.split())[:300]
    assert text in out and len(text) > 30


def _stop_at_eleven(stories: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, broken on purpose in its last step: its checkpoint is of the step before."""
    with monkeypatch.context() as patched:
        disturb(patched, {12: float("nan")})
        assert fit([*tiny_options(stories, run), *REPLAYED]) == 2
    assert read_checkpoint(run)["global_step"] == 11


def test_replay_names_the_first_module_that_breaks(stories, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    disturb(monkeypatch, {12: float("nan")})
    assert fit(tiny_options(stories, run)) == 2
    monkeypatch.undo()
    file, last = run / "incidents" / "step_12.pt", run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["state_dict"]["model.layers.1.ffn_norm.weight"][3] = float("nan")
    torch.save(content, tmp_path / "bad.ckpt")
    found = replay(file, tmp_path / "bad.ckpt")
    assert found.first_broken == "layers.1.ffn_norm"
    assert found.gradients[0][1] != found.gradients[0][1] and found.rows[0].loss != found.rows[0].loss  # NaN first
    capsys.readouterr()
    assert bitnet(["replay", str(file), "--checkpoint", str(tmp_path / "bad.ckpt")]) == 0
    assert "not finite    first in the output of layers.1.ffn_norm" in capsys.readouterr().out


def test_replay_with_a_teacher(finished_run, stories, tmp_path, monkeypatch, capsys, run_fit) -> None:
    """The teacher is in no checkpoint; it comes from where the run began."""
    run_fit(stories, tmp_path / "float", "--model.recipe.weight=none", "--model.recipe.act_bits=none")
    options = [
        *("fit", "--config", "posttrain/distilled", "--config", "overlays/smoke", f"--data.path={stories}"),
        *(f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"),
        f"--model.init_from={tmp_path / 'float'}",
    ]
    seen: list[float] = []
    original = LitBitNet.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append(float(loss.detach()))
        return loss * float("nan") if self.global_step + 1 == 6 else loss

    monkeypatch.setattr(LitBitNet, "training_step", training_step)
    assert fit(options) == 2
    found = replay(tmp_path / "run" / "incidents" / "step_6.pt")
    assert found.checkpoint_step == 5 and found.loss == seen[5]


@pytest.mark.parametrize("content", [None, b"no zip", {"a": 1}, [1]])
def test_replay_refuses_what_is_no_incident(tmp_path, capsys, content) -> None:
    file = tmp_path / "step_1.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert bitnet(["replay", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(file) in error


@pytest.mark.parametrize("options", [{"window": 1}, {"keep": 0}, {"spike_sigmas": -1.0}])
def test_bad_settings_are_refused(options) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Watch(**options)


def test_deviation_is_the_standard_deviation_of_normal_losses_and_ignores_outliers() -> None:
    normal = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.3 + 4).tolist()
    assert robust(normal) == (pytest.approx(4, abs=0.01), pytest.approx(0.3, rel=0.03))
    assert robust([*normal, *[1e9] * 200]) == (pytest.approx(4, abs=0.02), pytest.approx(0.3, rel=0.05))
    assert robust([2.0] * 9) == (2.0, 2e-3)


def test_broken_names_value_and_process() -> None:
    nan, inf = float("nan"), float("inf")
    assert broken([1.0, 2.0], [3.0, 3.0]) == ""
    assert broken([1.0, nan], [nan, nan]) == "the loss is nan (process 1)"
    assert broken([nan], [1.0]) == "the loss is nan"
    assert broken([1.0, 1.0], [inf, inf]) == "the gradient norm is inf"


DISTURBED = """
import sys
from bitnet.training.cli import main
from bitnet.training.lit import LitBitNet
original = LitBitNet.training_step
def training_step(self, batch, batch_idx):
    bad = self.global_step + 1 == 8 and self.global_rank == 1
    return original(self, batch, batch_idx) * (float("nan") if bad else 1.0)
LitBitNet.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_all_processes_stop_and_each_keeps_its_batch(stories, tmp_path, overlay) -> None:
    """Only the second process has a bad loss; one line, two files with different rows, nobody hangs."""
    script, run = tmp_path / "disturbed.py", tmp_path / "run"
    script.write_text(DISTURBED)
    options = ["--config", f"overlays/{overlay}", "--trainer.devices=2", "--data.batch_size=2", ONE_SAVE % 5]
    done = run_python(str(script), *tiny_options(stories, run), *options, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "step 8: the loss is nan (process 1)" in lines[0]
    files = sorted((run / "incidents").iterdir())
    assert [f.name for f in files] == ["step_8_rank0.pt", "step_8_rank1.pt"]
    first, second = (read_incident(f) for f in files)
    assert torch.tensor(first["loss"]).isfinite() and torch.tensor(second["loss"]).isnan()
    assert not torch.equal(first["batches"][0]["inputs"], second["batches"][0]["inputs"])
    assert read_checkpoint(run)["global_step"] == 5
    assert json.dumps(first["recipe"]) == json.dumps(second["recipe"])
