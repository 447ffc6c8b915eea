"""The one exception that means "the input is wrong", as opposed to "the program is wrong".

Every command turns a ``UserError`` into one line on stderr and exit code 2 (a traceback only with ``--debug``).
Its text therefore names the file or field, the value found there, and what to do about it.
"""

import difflib
import errno
from collections.abc import Iterable

LONGEST = 2000
"""Characters of a message that are shown."""


class UserError(ValueError):
    """Bad input: a file, a field or a combination of them that the user can mend."""

    def __str__(self) -> str:
        """One line that a terminal can be shown: names from a stranger's file may hold line ends and escape codes."""
        text = super().__str__()
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class SaidByFirstProcess(UserError):
    """The error that the first process of a run prints for all of them; the others only end."""


NO_NUMBERS = "the logits of this model are nan or infinite: its training went wrong; take an earlier checkpoint."

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""What the system answers when a file may not grow: no space, a limit on the size of files, a quota."""


FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def of_the_machine(error: BaseException) -> UserError | None:
    """Memory or disk that has run out or is not to be written to, as an error that the user can mend; None for any
    other error."""
    from concurrent.futures.process import BrokenProcessPool

    text = str(error)
    if isinstance(error, BrokenProcessPool):
        return UserError("a process of this command was ended; if nobody did that, the memory has run out.")
    if isinstance(error, MemoryError) or "out of memory" in text or "DefaultCPUAllocator: " in text:
        return UserError(
            f"out of memory ({' '.join(text.split())[-120:]}); lower data.batch_size or model.config.*, "
            "or see 'bitnet inspect CONFIG' and docs/training.md for what takes less."
        )
    said = error.__context__ if isinstance(error, RuntimeError) else error  # torch trips over what the system said
    if isinstance(said, OSError) and said.errno in DISK_FULL | FORBIDDEN:
        where = f"{said.filename}: " if said.filename else ""
        what = "the disk is full" if said.errno in DISK_FULL else "not allowed"
        return UserError(f"{where}{what} ({said.strerror}).")
    return None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """``" Did you mean 'dim'?"`` for the candidate nearest to ``word``, or an empty string when none is near."""
    near = difflib.get_close_matches(word, sorted(set(candidates)), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
