"""Which folder a run is written to: a new one for each run, the old one for a run that goes on."""

import glob
import os
import shutil
import sys
from pathlib import Path

from bitnet.checkpoint import damage
from bitnet.errors import UserError
from bitnet.replacing import PARTIAL_SUFFIX
from bitnet.sharded_checkpoint import is_sharded
from bitnet.training.atomic import LAST, PREVIOUS


def is_first_process() -> bool:
    """Whether this is the process that writes; the launchers tell by an environment variable before anything else.

    A shell inside of Slurm hands SLURM_PROCID on to processes that Lightning starts and numbers by LOCAL_RANK.
    """
    rank = next((os.environ[v] for v in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if v in os.environ), "0")
    return rank == "0"


def warn(line: str) -> None:
    """In the first process."""
    if is_first_process():
        print(f"warning: {line}.", file=sys.stderr)


def run_family(root: Path) -> list[Path]:
    """``root``, ``root-2``, ``root-3``, ... as far as they exist, oldest first."""
    numbered = []
    for folder in root.parent.glob(f"{glob.escape(root.name)}-*"):
        if (number := folder.name.removeprefix(f"{root.name}-")).isdecimal():
            numbered.append((int(number), folder))
    return [root, *(folder for _, folder in sorted(numbered))] if root.exists() else [f for _, f in sorted(numbered)]


def is_free(folder: Path) -> bool:
    """Whether there is nothing but what a stopped write left."""
    return not folder.exists() or (
        folder.is_dir() and all(file.name.endswith(PARTIAL_SUFFIX) for file in folder.iterdir())
    )


def new_run_folder(root: Path, overwrite: bool) -> Path:
    """``root`` if it is free or may be overwritten, else the first free ``root-<n>``.

    Only a folder that looks like a run (it has a config.yaml) may be overwritten.
    """
    if is_free(root):
        return root
    if overwrite:
        if not (root / "config.yaml").is_file():
            raise UserError(
                f"--overwrite: {root} is not the folder of a run (it has no config.yaml); remove it yourself."
            )
        return root
    number = 2
    while (folder := root.with_name(f"{root.name}-{number}")).exists():
        number += 1
    return folder


def set_aside(folder: Path) -> Path:
    """Rename a run that another one replaces; ``settle`` removes it, or puts it back."""
    aside = folder.with_name(f".{folder.name}.replaced")
    if aside.exists():  # a replacement was killed: one of the two has nothing in it that was trained
        shutil.rmtree(aside if _checkpoints(folder) else folder)
    if not aside.exists():
        folder.rename(aside)
    return aside


def settle(aside: Path, folder: Path, failed: bool) -> None:
    """End a replacement: nothing that was trained is lost where the new run ``failed`` before it could save."""
    if failed and not _checkpoints(folder):
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    else:
        shutil.rmtree(aside)


def find_run(root: Path, ckpt_path: str) -> tuple[Path, Path]:
    """``(run folder, checkpoint)`` to continue: the newest of the family for ``last``, else the one named; a file that
    lies in no run goes on in a new folder.

    Where the newest checkpoint of the run is damaged, the one before it is taken, and a line says so.
    """
    if ckpt_path != "last":
        file = Path(ckpt_path)
        if file.is_dir() and not is_sharded(file):
            if not (found := _checkpoints(file)):
                raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint; the folder holds no checkpoints/{LAST}.")
            return file, _newest_whole(found)
        if not (file.is_file() or is_sharded(file)):
            raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint.")
        file = file if file.parent.name else file.absolute()
        if file.parent.name == "checkpoints":
            return file.parent.parent, file
        # A checkpoint by itself is of no run here: what lies at ``root`` is another one.
        return new_run_folder(root, overwrite=False) if is_first_process() else root, file
    for folder in reversed(run_family(root)):
        if found := _checkpoints(folder):
            return folder, _newest_whole(found)
    raise UserError(f"--ckpt_path last: no run at {root} has saved a checkpoint yet.")


def _checkpoints(folder: Path) -> list[Path]:
    """What a run in ``folder`` can go on from, newest first."""
    return [file for name in (LAST, PREVIOUS) if (file := folder / "checkpoints" / name).exists()]


def _newest_whole(files: list[Path]) -> Path:
    """The first of ``files`` that is not damaged."""
    reasons: list[str] = []
    for file in files:
        if not (why := damage(file)):
            if reasons:
                warn(f"{'; '.join(reasons)}; going on from {file}")
            return file
        reasons.append(f"{file} is damaged ({why})")
    raise UserError(f"--ckpt_path: {'; '.join(reasons)}; nothing to go on from, begin the run anew.")
