"""What several checks use: one refusal, and the memory that something takes."""

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet.errors import UserError
from bitnet.sharded_checkpoint import write_checksums

PATIENCE = 10.0
"""Factor on every limit of time: a busy machine is slower than the one that the limit was meant for."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def refusal(call: Callable[[], object], *names: object) -> str:
    """The one line that refuses, if it has all ``names``; else an empty string."""
    try:
        call()
    except UserError as error:
        text = str(error)
        return text if "\n" not in text and all(str(name) in text for name in names) else ""
    except Exception:
        return ""
    return ""


def folder_of_parts(folder: Path, plain: dict[str, Any]) -> Path:
    """A sharded checkpoint of one tensor; whoever changes it writes the checksums again."""
    from torch.distributed import checkpoint as sharded

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded.save({"state_dict": {"model.a": torch.zeros(9)}}, checkpoint_id=folder, no_dist=True)
    torch.save(plain, folder / "meta.pt")
    write_checksums(folder, 0)
    return folder


def _kilobytes(field: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


def costs(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes of memory beyond those held before; 0 bytes where there is no /proc to say."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # the peak begins anew
    before = _kilobytes("VmRSS") if CLEAR.exists() else 0
    started = time.monotonic()
    call()
    seconds = time.monotonic() - started
    return seconds, (_kilobytes("VmHWM") - before) * 1024 if CLEAR.exists() else 0
