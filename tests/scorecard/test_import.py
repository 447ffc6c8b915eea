"""P: looking at the library does nothing to the machine."""

import os
import subprocess
import sys

import pytest

from ..conftest import ROOT

HOOK = """
import os, sys
work = os.path.realpath(os.getcwd()) + os.sep
events = []
def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.posix_spawn", "os.fork", "os.exec", "os.system")):
        events.append((event, str(arguments)[:200]))
    elif event == "open" and isinstance(arguments[2], int):
        name, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(name, (str, bytes)) and not inside(name):
            events.append((event, os.fsdecode(name)))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "shutil.copyfile", "tempfile.mkstemp",
                   "tempfile.mkdtemp") and not inside(arguments[0]):
        events.append((event, str(arguments[:2])))
def inside(name):
    return os.path.realpath(os.fsdecode(name)).startswith(work) or os.fsdecode(name) == os.devnull
sys.addaudithook(hook)
"""
PROGRAM = "import sys; from bitnet.__main__ import main; sys.argv = ['bitnet', {}'--help']; main()"
COMMANDS = {
    "import bitnet": "import bitnet",
    "bitnet --help": PROGRAM.format(""),
    # Not fit, which loads Lightning: with it comes matplotlib, which looks for fonts when a user first loads it.
    **{name: PROGRAM.format(f"'{name}', ") for name in ("generate", "pack", "inspect", "evaluate", "export")},
}


def events_of(code: str, folder: str) -> list[str]:
    """What ``code`` does to the machine, in a process of its own with an empty home; compiled files are Python's."""
    program = f"{HOOK}\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('EVENTS', events)"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {k: v for k, v in os.environ.items() if k not in ("BITNET_CACHE", "XDG_CACHE_HOME")}
    home = os.path.join(os.path.dirname(folder), "home")
    os.makedirs(home, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=folder,
        env={**environment, "PYTHONPATH": paths, "HOME": home, "TMPDIR": folder},  # whose folder Python tries out
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    left = [os.path.join(where, name) for where, _, names in os.walk(home) for name in names]
    found = [line for line in done.stdout.splitlines() if line.startswith("EVENTS ")][-1].removeprefix("EVENTS ")
    return left + ([] if found == "[]" else [found])


@pytest.mark.slow
@pytest.mark.check("P2", "import and --help (but for fit) open no socket, start no process and write no file", 7)
def test_looking_does_nothing(tmp_path, tally) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name, code in COMMANDS.items():
        found = events_of(code, str(work))
        tally(not found and not list(work.iterdir()), f"{name}: {found}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; open(os.path.expanduser('~/trace'), 'w').close()",
    ],
)
def test_the_hook_sees_what_it_looks_for(tmp_path, code) -> None:
    work = tmp_path / "work"
    work.mkdir()
    assert events_of(code, str(work))
