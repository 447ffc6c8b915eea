"""R: training survives kills and signals, and repeats itself."""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.checkpoint import read_checkpoint
from bitnet.data.loader import TrainLoader
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet
from bitnet.training.report import read_curves

from ..conftest import tiny_options
from ..runs import SAVES_AT_THE_END, STREAM, WINDOW, resume_or_begin, run_digest, run_python, start_life

SECONDS_TO_END = 15.0
"""For a run of this size a signal takes well under 5 seconds; on a machine busy with other jobs, three times that."""
NO_VALIDATION = "--trainer.val_check_interval=100000"


def partial_files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob(".*"))


# ---- R1


def kill_when_due(process: Any, checkpoints: Path, chance: random.Random, inside_save: bool) -> bool:
    """SIGKILL at a random moment after at least one new save; True when a half-written file was there."""
    last = checkpoints / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.0005)
    due = time.monotonic() + chance.random() * 0.25
    while process.is_alive() and time.monotonic() < due:
        time.sleep(0.0005)
    while inside_save and process.is_alive() and not any(checkpoints.glob(".last*.partial")):
        pass
    process.kill()
    process.join()
    return any(checkpoints.glob(".last*.partial"))


def killed_twenty_times(texts: Path, folder: Path, options: tuple[str, ...], log: Path, tally: Any) -> int:
    """Kill a run until it has had enough, and let it end; the number of kills that fell inside a save."""
    chance, halves = random.Random(0), 0
    for kill in range(20):
        process = start_life([*tiny_options(texts, folder), *options, *resume_or_begin(folder)], log)
        halves += kill_when_due(process, folder / "checkpoints", chance, inside_save=kill % 2 == 0)
        tally(process.exitcode == -signal.SIGKILL, f"life {kill} ended by itself: {log.read_text()[-300:]}")
    process = start_life([*tiny_options(texts, folder), *options, "--ckpt_path=last"], log)
    process.join()
    tally(process.exitcode == 0, f"the last life: {log.read_text()[-300:]}")
    return halves


@pytest.mark.slow
@pytest.mark.check(
    "R1", "a run killed 20 times at random moments, half of them inside a save, ends with the same bits", 46
)
def test_twenty_kills_end_with_the_same_bits(texts, tmp_path, run_fit, tally) -> None:
    for name, options in (("rows", ()), ("stream-window", (*STREAM, *WINDOW))):
        quick = ("--trainer.max_steps=400", NO_VALIDATION, *options)
        run_fit(texts, tmp_path / f"{name}-whole", *quick)
        folder = tmp_path / name
        halves = killed_twenty_times(texts, folder, quick, tmp_path / f"{name}.log", tally)
        assert halves >= 5, "too few kills fell inside a save to prove anything"
        tally(run_digest(folder) == run_digest(tmp_path / f"{name}-whole"), f"{name}: other bits")
        tally(not partial_files(folder), f"{name}: {partial_files(folder)}")
    assert len(list(tmp_path.iterdir())) == 6, "nothing else was left anywhere"


# ---- R2


def die_in_save(saves: int, place: int, note: str, temporary: str) -> None:
    """In a process of its own: SIGKILL in a save: behind ``place`` bytes or, negative, before a rename."""
    from bitnet.training import atomic

    os.environ["TMPDIR"] = temporary
    count = itertools.count(1)
    save, renames = torch.save, {"link": -1, "replace": -2}

    class Dying:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, place

        def write(self, data: Any) -> int:
            data = bytes(data)
            if len(data) > self.left:
                self.file.write(data[: self.left])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= len(data)
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def dying_save(content: Any, file: Any) -> None:
        if next(count) < saves:
            return save(content, file)
        Path(note).write_text(str(content["global_step"]))
        if place >= 0:
            return save(content, Dying(file))
        save(content, file)
        for name, number in renames.items():
            if number == place:
                setattr(atomic.os, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return None

    atomic.torch.save = dying_save


@pytest.mark.slow
@pytest.mark.check("R2", "a kill at any byte of a save leaves the checkpoint of this step or of the one before", 81)
def test_kills_inside_a_save(texts, tmp_path, run_fit, tally) -> None:
    folder, log, note = tmp_path / "run", tmp_path / "log", tmp_path / "note"
    options = [*tiny_options(texts, folder), "--trainer.max_steps=1000", NO_VALIDATION]
    run_fit(texts, folder, "--trainer.max_steps=1")
    size, chance = (folder / "checkpoints" / "last.ckpt").stat().st_size, random.Random(0)
    elsewhere = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    strangers = set(elsewhere.iterdir())
    for kill in range(40):
        place = -1 - kill % 2 if kill % 5 == 4 else chance.randrange(size)
        temporary = elsewhere if kill % 2 else tmp_path
        process = start_life(
            [*options, "--ckpt_path=last"], log, die_in_save, chance.randint(1, 3), place, str(note), str(temporary)
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-500:]
        step, found = int(note.read_text()), read_checkpoint(folder)["global_step"]
        tally(found in (step, step - 1), f"kill {kill} at {place} in the save of step {step}: step {found}")
        # One life has removed what the last one left: no more than the files of one death lie there.
        tally(len({file.name.split(".")[-2] for file in partial_files(folder)}) <= 1, f"{partial_files(folder)}")
    run_fit(texts, folder, f"--trainer.max_steps={found + 1}", "--ckpt_path=last")
    tally(not partial_files(folder) and not {f for f in elsewhere.iterdir() if "torch" in f.name} - strangers)


# ---- R3


def rows_of_twenty_batches(workers: int = 0, weights: list[float] | None = None) -> TrainLoader:
    """20 batches of 3 rows an epoch and two rows that fill none; the first id of a row tells which it is."""
    sources = [np.arange(1000 * i, 1000 * i + n * 4 + 1, dtype=np.uint16) for i, n in enumerate((41, 21))]
    return TrainLoader(sources, 4, 3, weights=weights, workers=workers)


@pytest.mark.check(
    "R3", "stopped at any of 40 batch borders, the rows go on in the same order, none lost, none twice", 320
)
def test_order_of_rows(tally) -> None:
    def batches(loader: TrainLoader, count: int) -> list[list[int]]:
        """The first ids of ``count`` batches, over as many epochs as that takes."""
        endless = (batch for _ in itertools.count() for batch in loader)
        return [batch["inputs"][:, 0].tolist() for batch in itertools.islice(endless, count)]

    ids = {4 * row for row in range(41)} | {1000 + 4 * row for row in range(21)}
    for weights in (None, [0.3, 0.7]):
        whole = batches(rows_of_twenty_batches(weights=weights), 40)
        for epoch in (whole[:20], whole[20:]):
            drawn = [i for batch in epoch for i in batch]
            assert set(drawn) <= ids and (weights is not None or len(set(drawn)) == 60)
        assert whole[:20] != whole[20:]
        for before, behind in itertools.product((0, 2), (0, 2)):
            for stop in range(40):
                loader = rows_of_twenty_batches(before, weights)
                resumed = rows_of_twenty_batches(behind, weights)
                seen = batches(loader, stop)
                resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
                loader.feed.close()
                held = seen + batches(resumed, 40 - stop) == whole
                tally(held, f"weights {weights}, workers {before}, {behind}: stop at {stop}")
                resumed.feed.close()


# ---- R4


@pytest.mark.slow
@pytest.mark.check("R4", "fresh processes repeat every loss and the final bits; another number of threads is named", 6)
def test_fresh_processes_repeat(texts, tmp_path, tally) -> None:
    def train(folder: Path, threads: int, *options: str) -> str:
        arguments = (*tiny_options(texts, folder), SAVES_AT_THE_END, *options)
        return run_python("train.py", *arguments, OMP_NUM_THREADS=str(threads)).stderr

    fifty = ("--trainer.max_steps=50", "--trainer.log_every_n_steps=1")
    found: list[Any] = []
    for i in range(5):
        train(tmp_path / str(i), 1, *fifty)
        losses = read_curves(tmp_path / str(i), ("train/loss",))["train/loss"]
        assert len(losses) == 50 and losses[0][1] != losses[-1][1]
        found.append((losses, run_digest(tmp_path / str(i))))
        tally(found[i] == found[0], f"process {i}")
    said = train(tmp_path / "0", 2, "--trainer.max_steps=51", "--ckpt_path=last")
    tally("warning: threads = 2, but 1 when the checkpoint was saved" in said, said)


# ---- R5


def marks_its_first_batch(marker: str) -> None:
    original = LitBitNet.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        Path(marker).touch()
        return original(self, batch, batch_idx)

    LitBitNet.training_step = training_step


@pytest.mark.slow
@pytest.mark.check(
    "R5", "SIGTERM and Ctrl-C, 10 each: saved, exit 143 and 130 in time, and the end has the same bits", 41
)
def test_signals(texts, tmp_path, run_fit, tally) -> None:
    options = ("--trainer.max_steps=300", "--trainer.val_check_interval=30", SAVES_AT_THE_END, *WINDOW)
    run_fit(texts, tmp_path / "whole", *options)
    folder, log, marker, chance = tmp_path / "run", tmp_path / "log", tmp_path / "marker", random.Random(0)
    arguments = [*tiny_options(texts, folder), *options]
    step = 0
    for trial in range(20):
        received = (signal.SIGTERM, signal.SIGINT)[trial % 2]
        marker.unlink(missing_ok=True)
        process = start_life([*arguments, *resume_or_begin(folder)], log, marks_its_first_batch, str(marker))
        while process.is_alive() and not marker.exists():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        sent = time.monotonic()
        os.kill(process.pid, received)
        process.join()
        took, said = time.monotonic() - sent, log.read_text()
        tally(
            process.exitcode == 128 + received and took < SECONDS_TO_END,
            f"{process.exitcode} after {took:.1f} s: {said}",
        )
        before, step = step, read_checkpoint(folder)["global_step"]
        tally(step > before and f"step {step} is saved; go on with" in said, f"step {before}, then {step}: {said}")
    assert step < 300, "the signals came too late to prove anything"
    assert fit([*arguments, "--ckpt_path=last"]) == 0
    tally(run_digest(folder) == run_digest(tmp_path / "whole"), "other bits")
