"""Checks of command-line options that several commands share, made before any work begins."""

import argparse
import os
from pathlib import Path

from bitnet.errors import UserError


def check_folder(option: str, file: str | None) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    if file is not None and not Path(file).parent.is_dir():
        raise UserError(f"{option} {file}: the folder {Path(file).parent} does not exist.")
    if file is not None and Path(file).is_dir():
        raise UserError(f"{option} {file}: is a folder; name a file.")
    if file is not None and not os.access(place := Path(file) if Path(file).exists() else Path(file).parent, os.W_OK):
        raise UserError(f"{option} {file}: {place} cannot be written to.")


def new_path(option: str, name: str) -> Path:
    """A path to make something at: its folder exists, and nothing is there yet."""
    if Path(name).exists():
        raise UserError(f"{option} {name}: exists already.")
    check_folder(option, name)
    return Path(name)


def check_outputs(args: argparse.Namespace) -> None:
    check_folder("--json", args.json)
    check_folder("--plot", args.plot)
    if args.plot and Path(args.plot).suffix not in (".png", ".svg"):
        raise UserError(f"--plot {args.plot}: the name must end in .png or .svg.")


def check_device(device: str) -> None:
    import torch

    there = torch.cuda.is_available()
    if device not in ("cpu", "cuda") or (device == "cuda" and not there):
        raise UserError(f"--device {device}: must be cpu{' or cuda' if there else ' on this machine'}.")


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads}: must be at least 1.")
        torch.set_num_threads(threads)


def numbers(text: str) -> list[int]:
    """``1,4,16`` as a list of positive integers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers such as 1,2")
    return numbers


def whole_number(text: str) -> int:
    """``0``, ``1``, ``2`` ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 or more")
    return int(text)
