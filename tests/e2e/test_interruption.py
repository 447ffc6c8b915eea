"""SIGTERM and Ctrl-C at chosen moments; the scorecard sends them at random ones."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from bitnet.checkpoint import read_checkpoint
from bitnet.training import interruption
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet

from ..conftest import tiny_options
from ..runs import SAVES_AT_THE_END, WINDOW, run_digest, run_python, start_life
from .test_overlays import command

STEPS = ("--trainer.max_steps=12", "--trainer.val_check_interval=6", SAVES_AT_THE_END)


def send(monkeypatch: pytest.MonkeyPatch, hook: str, at: int, received: int = signal.SIGTERM) -> None:
    """Let this process get a signal in the ``at``-th call of a hook of the run."""
    original, calls = getattr(LitBitNet, hook), []

    def patched(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), received)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LitBitNet, hook, patched)


@pytest.mark.parametrize(
    "hook,at,step,options",
    [
        ("training_step", 5, 5, ()),
        ("training_step", 5, 2, WINDOW),  # the fifth of six batches: the window is finished
        ("validation_step", 3, 6, ()),
        ("validation_step", 1, 6, ()),
        ("validation_step", 7, 12, ()),
    ],
)
def test_a_run_that_is_ended_goes_on_with_the_same_bits(
    texts, tmp_path, run_fit, monkeypatch, capsys, hook, at, step, options
) -> None:
    run_fit(texts, tmp_path / "whole", *STEPS, *options)
    capsys.readouterr()
    run = tmp_path / "run"
    arguments = [*tiny_options(texts, run), *STEPS, *options]
    with monkeypatch.context() as patched:
        send(patched, hook, at)
        assert fit(arguments) == 143
    line = capsys.readouterr().err
    assert line.startswith(f"stopped by SIGTERM: step {step} is saved; go on with '") and line.count("\n") == 1
    assert f"fit --config {run}/config.yaml --ckpt_path last'" in line
    assert read_checkpoint(run)["global_step"] == step
    assert fit(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert run_digest(run) == run_digest(tmp_path / "whole")


def test_a_window_that_takes_too_long_is_given_up(texts, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(interruption, "PATIENCE", -1.0)
    run = tmp_path / "run"
    arguments = [*tiny_options(texts, run), *STEPS, *WINDOW]
    with monkeypatch.context() as patched:
        send(patched, "training_step", 4, signal.SIGINT)
        assert fit(arguments) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C: nothing had been saved.\n"
    assert fit([*arguments, "--trainer.max_steps=3", "--overwrite"]) == 0
    before = run_digest(run)
    send(monkeypatch, "training_step", 2, signal.SIGINT)
    capsys.readouterr()
    assert fit([*arguments, "--ckpt_path=last"]) == 130
    assert "the checkpoint is of an earlier step; go on with" in capsys.readouterr().err
    assert run_digest(run) == before


def test_before_training_nothing_is_saved(texts, tmp_path, monkeypatch, capsys) -> None:
    send(monkeypatch, "configure_model", 1)
    assert fit(tiny_options(texts, tmp_path / "run")) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: no step had been made.\n"


def test_signals_have_their_handlers_back_afterwards(texts, tmp_path, monkeypatch, capsys) -> None:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    send(monkeypatch, "training_step", 2)
    fit(tiny_options(texts, tmp_path / "run"))
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def interrupted_in_a_save_that_hangs(marker: str) -> None:
    """In a process of its own: Ctrl-C in the first step, and a save that takes for ever."""
    original = LitBitNet.training_step

    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    def save(*args):
        Path(marker).touch()
        time.sleep(600)

    LitBitNet.training_step, torch.save = training_step, save


def test_a_second_ctrl_c_ends_at_once(texts, tmp_path, run_fit) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    run_fit(texts, run, *STEPS)
    before = run_digest(run)
    arguments = [*tiny_options(texts, run), *STEPS, "--trainer.max_steps=100000", "--ckpt_path=last"]
    process = start_life(arguments, tmp_path / "log", interrupted_in_a_save_that_hangs, str(marker))
    try:
        while not marker.exists():
            assert process.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        assert process.exitcode == -signal.SIGINT
    finally:
        process.kill()
    assert run_digest(run) == before


@pytest.mark.slow
def test_two_processes_stop_behind_the_same_step_and_go_on(texts, tmp_path) -> None:
    """Only the second process is told."""
    script, run = tmp_path / "told.py", tmp_path / "run"
    script.write_text(TOLD)
    done = run_python(str(script), *tiny_options(texts, run), *STEPS, *TWO, code=143)
    assert done.stderr.count("stopped by SIGTERM: step 4 is saved") == 1
    assert read_checkpoint(run)["global_step"] == 4
    command([*tiny_options(texts, run), *STEPS, *TWO, "--ckpt_path=last"])
    command([*tiny_options(texts, tmp_path / "whole"), *STEPS, *TWO])
    assert run_digest(run) == run_digest(tmp_path / "whole")


TWO = ("--config", "overlays/ddp", "--trainer.devices=2", "--data.batch_size=2")
TOLD = """
import os, signal, sys
from bitnet.training.cli import main
from bitnet.training.lit import LitBitNet
original = LitBitNet.training_step
def training_step(self, batch, batch_idx):
    if self.global_step + 1 == 4 and self.global_rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, batch, batch_idx)
LitBitNet.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""
