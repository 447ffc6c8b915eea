"""Runs over a grid of settings and seeds, each a ``fit`` in a process of its own.

optuna's ``GridSampler`` deals the points out to the processes that work on a sweep, and its journal keeps what became
of them. Whether a run is finished is read from its folder alone, so no record can disagree with what is there.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from bitnet.errors import UserError
from bitnet.training.cli import parse_config
from bitnet.training.run_folder import find_run, is_free
from bitnet.training.shipped import find_config

JOURNAL = "optuna.journal"
Settings = dict[str, str]


@dataclass(frozen=True)
class Axis:
    """One ``--grid`` option: a key with its values, or several keys whose values go together."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return "+".join(self.keys)

    @property
    def choices(self) -> list[str]:
        return ["+".join(value) for value in self.values]


def parse_grid(options: list[str]) -> tuple[Axis, ...]:
    """``KEY=V,V`` or ``KEY+KEY=V+V,V+V`` of each option. A comma inside brackets belongs to its value."""
    axes: list[Axis] = []
    for option in options:
        name, equals, text = option.partition("=")
        keys = tuple(key.removeprefix("--") for key in name.split("+"))
        choices = _at_commas(text)
        if not equals or not all(keys) or not all(choices):
            raise UserError(f"--grid {option}: write KEY=VALUE,VALUE as in --grid model.optim.lr=1e-3,2e-3.")
        values = tuple(tuple(choice.split("+")) if len(keys) > 1 else (choice,) for choice in choices)
        if odd := next((v for v in values if len(v) != len(keys)), None):
            raise UserError(
                f"--grid {option}: {'+'.join(odd)!r} has {len(odd)} values for {len(keys)} keys; join as many by +."
            )
        if len(set(values)) < len(values):
            raise UserError(f"--grid {option}: a value stands there twice.")
        axes.append(Axis(keys, values))
    keys_seen = [key for axis in axes for key in axis.keys]
    if twice := next((key for key in keys_seen if keys_seen.count(key) > 1), None):
        raise UserError(f"--grid {twice}: the key is given twice; put its values into one list.")
    return tuple(axes)


def _at_commas(text: str) -> list[str]:
    """``text`` cut at the commas outside of all brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@dataclass(frozen=True)
class Run:
    """One training: the settings of a grid point, a seed, and the folder for it."""

    settings: Settings
    seed: int
    folder: Path
    text: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for."""

    config: str
    axes: tuple[Axis, ...]
    seeds: int
    out: Path
    options: tuple[str, ...]

    @cached_property
    def short(self) -> dict[str, str]:
        """The last part of every key, or all of it where two end alike."""
        keys = [key for axis in self.axes for key in axis.keys]
        last = [key.rpartition(".")[2] for key in keys]
        return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}

    @cached_property
    def points(self) -> list[Settings]:
        return [
            {k: v for axis, value in zip(self.axes, chosen, strict=True) for k, v in zip(axis.keys, value, strict=True)}
            for chosen in itertools.product(*(axis.values for axis in self.axes))
        ]

    @cached_property
    def runs(self) -> list[Run]:
        return [self.run_of(point, seed) for point in self.points for seed in range(self.seeds)]

    def run_of(self, settings: Settings, seed: int) -> Run:
        named = [(self.short[key], value) for key, value in settings.items()]
        name = ",".join(f"{key}={value}" for key, value in named)
        plain = re.sub(r"[^\w.+=,-]", "_", name)
        if plain != name or len(plain) > 150:  # two values may look alike now
            plain = f"{plain[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        text = ", ".join(f"{key} = {value}" for key, value in named)
        return Run(settings, seed, self.out / f"{plain},seed={seed}", f"{text}, seed {seed}")

    def fit_options(self, settings: Settings) -> list[str]:
        return ["--config", self.config, *self.options, *(f"--{key}={value}" for key, value in settings.items())]

    @cached_property
    def mark(self) -> str:
        """In the names of studies, since one that another process is making has its name from the start."""
        return f"options {self.fingerprint()}"

    def fingerprint(self) -> str:
        """Stands for all that must stay the same while a sweep goes on: options, and what is in its configs."""
        names = [self.config]
        for option, value in itertools.pairwise([*self.options, ""]):
            names += [value] if option in ("--config", "-c") else []
            names += [option.removeprefix("--config=")] if option.startswith("--config=") else []
        contents = [find_config(name).read_text(encoding="utf-8") for name in names]
        return hashlib.sha256(json.dumps([self.options, contents]).encode()).hexdigest()[:16]


def check(sweep: Sweep) -> None:
    """Refuse before the first run what would make every run fail, above all a key that no config has."""
    if sweep.out.exists() and not is_free(sweep.out) and not (sweep.out / JOURNAL).is_file():
        raise UserError(f"--out {sweep.out}: there is something else than a sweep; give another folder.")
    first: UserError | None = None
    for settings in sweep.points:
        try:
            parse_config(sweep.fit_options(settings))
        except UserError as error:
            first = first or error
        else:
            return
    assert first is not None
    raise first


def _summary(run: Run) -> tuple[dict[str, Any], bool] | None:
    """The summary of a run, and whether it has made all its steps; None without one."""
    try:
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
        trainer = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # not there yet, or damaged
        return None
    by_steps = trainer.get("max_epochs") is None and trainer.get("max_time") is None
    return summary, not by_steps or summary["steps"] >= trainer["max_steps"]


def figures(run: Run) -> dict[str, Any] | None:
    """``figures`` in the summary of a run that has made all its steps; None for any other."""
    found = _summary(run)
    return found[0]["figures"] if found and found[1] else None


def _torn(journal: Path) -> bytes:
    """The part of a line that a power cut or a full disk left at the end, behind which nothing could be read."""
    return journal.read_bytes().rpartition(b"\n")[2] if journal.is_file() else b""


def _why_no_result(run: Run) -> str:
    """Of one that ended without an error."""
    if (found := _summary(run)) and not found[1]:
        return f"it ended after {found[0]['steps']} steps; only runs that make all of trainer.max_steps are compared."
    return "it ended without a validation loss; look at trainer.val_check_interval and limit_val_batches."


class RunFailed(Exception):
    """A run that ended without a result; the others go on."""


class Runner:
    """Works through a sweep, alone or beside other processes."""

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep = sweep
        self.failed: dict[str, str] = {}
        """Run -> error line, of this call."""
        self.busy: set[str] = set()
        """Runs that another process was at when their turn came."""
        self._runs = {run.folder.name: run for run in sweep.runs}

    def finished(self) -> int:
        return sum(figures(run) is not None for run in self.sweep.runs)

    def command(self, run: Run) -> list[str]:
        command = [sys.executable, "-m", "bitnet", "fit", *self.sweep.fit_options(run.settings)]
        # The second one is for the order of the rows, which has a seed of its own.
        command += [f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
        command += ["--trainer.default_root_dir", str(run.folder)]
        try:
            find_run(run.folder, "last")
        except UserError:
            # What was stopped before its first checkpoint left a folder that fit would step aside for.
            return command if is_free(run.folder) else [*command, "--overwrite"]
        return [*command, "--ckpt_path", "last"]

    def show_commands(self) -> None:
        for number, run in enumerate(self.sweep.runs, 1):
            done = figures(run) is not None
            print(f"run {number} of {len(self.sweep.runs)}: {run.text}{' (finished)' if done else ''}")
            if not done:
                print(f"  {shlex.join(self.command(run))}")

    def run(self) -> None:
        """Run what is not finished; each run that fails is noted, and tried again in the next call."""
        self.sweep.out.mkdir(parents=True, exist_ok=True)
        self.check_is_same()
        storage = self.storage()  # before .locks: by this file another process knows the folder of a sweep
        (self.sweep.out / ".locks").mkdir(exist_ok=True)
        if done := self.finished():
            print(f"{done} of {len(self.sweep.runs)} runs are finished already")
        space = {axis.name: axis.choices for axis in self.sweep.axes}
        space["seed"] = [str(seed) for seed in range(self.sweep.seeds)]
        # A study has one fixed grid, and deals out nothing twice but what was killed. What failed or was interrupted
        # in one pass is the work of the next, and so is a grid that has grown.
        for number in itertools.count(1):
            if not self._todo():
                return
            sampler = optuna.samplers.GridSampler(space, seed=0)
            name = f"{json.dumps(space)}, {self.sweep.mark}, pass {number}"
            study = optuna.create_study(storage=storage, sampler=sampler, study_name=name, load_if_exists=True)
            if not sampler.is_exhausted(study):
                study.optimize(self._trial, catch=(RunFailed,))

    def check_is_same(self) -> None:
        """Refuse the folder of a sweep with other options."""
        if not all(self.sweep.mark in name for name in self.studies()):
            raise UserError(
                f"--out {self.sweep.out}: holds a sweep with other options or another config; give another --out."
            )

    def under_way(self) -> list[str]:
        """Runs that another process was at, and has not finished since."""
        return [name for name in sorted(self.busy) if figures(self._runs[name]) is None]

    def errors(self) -> dict[str, str]:
        """Run -> error line of the newest try, for runs that are not finished."""
        if not (names := self.studies()):
            return {}
        storage = self.storage()
        trials = [trial for name in names for trial in optuna.load_study(study_name=name, storage=storage).trials]
        trials.sort(key=lambda trial: str(trial.datetime_start))
        found = {t.user_attrs["run"]: t.user_attrs["error"] for t in trials if "error" in t.user_attrs}
        return {n: e for n, e in found.items() if n in self._runs and (n in self.failed or not figures(self._runs[n]))}

    def studies(self) -> list[str]:
        """Names, of as many passes and grids as there were."""
        if not (self.sweep.out / JOURNAL).is_file():
            return []
        return [study.study_name for study in optuna.get_all_study_summaries(self.storage())]

    def storage(self) -> JournalStorage:
        file = self.sweep.out / JOURNAL
        lock = JournalFileSymlinkLock(str(file))
        if _torn(file):
            lock.acquire()
            try:
                if line := _torn(file):  # still: nobody is writing it
                    os.truncate(file, file.stat().st_size - len(line))
            finally:
                lock.release()
        return JournalStorage(JournalFileBackend(str(file), lock))

    def _todo(self) -> bool:
        tried = self.failed.keys() | self.busy
        return any(figures(run) is None for name, run in self._runs.items() if name not in tried)

    def _trial(self, trial: optuna.Trial) -> float:
        settings: Settings = {}
        for axis in self.sweep.axes:
            chosen = trial.suggest_categorical(axis.name, axis.choices)
            settings |= zip(axis.keys, axis.values[axis.choices.index(chosen)], strict=True)
        seed = trial.suggest_categorical("seed", [str(seed) for seed in range(self.sweep.seeds)])
        run = self.sweep.run_of(settings, int(seed))
        name = run.folder.name
        trial.set_user_attr("run", name)
        if name in self.failed:
            raise RunFailed(self.failed[name])
        with self._lock(name) as lock:
            if lock is None:
                self.busy.add(name)
                raise optuna.TrialPruned
            error = self._fit(run, lock) if figures(run) is None else None
        loss = (figures(run) or {}).get("val/loss")
        if loss is None:
            self.failed[name] = error or _why_no_result(run)
            trial.set_user_attr("error", self.failed[name])
            raise RunFailed(self.failed[name])
        return float(loss)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[IO[str] | None]:
        """Held as long as this process or the training that it started lives; None where another one has it."""
        with (self.sweep.out / ".locks" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file

    def _fit(self, run: Run, lock: IO[str]) -> str | None:
        """Train; return the error line of a run that fails."""
        number = self.finished() + len(self.failed) + 1
        print(f"run {number} of {len(self.sweep.runs)}: {run.text}", flush=True)
        lines = [""]
        with (
            subprocess.Popen(self.command(run), stderr=subprocess.PIPE, pass_fds=(lock.fileno(),)) as child,
            # Untranslated, so that a line that is drawn over itself still is.
            io.TextIOWrapper(child.stderr, encoding="utf-8", errors="replace", newline="") as said,  # type: ignore[type-var]
        ):
            try:
                for line in said:
                    sys.stderr.write(line)
                    sys.stderr.flush()
                    lines = [*lines[-50:], line.strip()] if line.strip() else lines
                code = child.wait()
            except BaseException:
                _end(child)
                raise
        if code == 0:
            return None
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines)[-1] or f"it ended with exit code {code}."


def _end(child: subprocess.Popen[bytes]) -> None:
    """A terminal has sent Ctrl-C to the training, too; where nobody has, it must not live on."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(20)
    if child.poll() is None:
        os.kill(child.pid, 9)
        child.wait()
