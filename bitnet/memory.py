"""How much memory this process has taken."""

import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:  # the kernel's own mark begins with the program; getrusage inherits that of the parent
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
