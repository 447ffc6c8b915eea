"""Compile the C sources beside this file with the system's compiler, once, into the user's cache.

The library is keyed by sources, flags, compiler and architecture. It is written under another name and renamed, so that
processes that start together neither wait for nor disturb each other. It uses the OpenMP runtime that torch has
loaded: two runtimes would be two pools of threads that spin against each other on the same cores.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
# No fused multiply-add and no fast math: results must not depend on the compiler.
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class CannotCompile(Exception):
    """There is no compiler, or it refused; the text says which and why."""


def cache_root() -> Path:
    """``$BITNET_CACHE``, or ``bitnet-lightning`` in the user's cache folder."""
    if folder := os.environ.get("BITNET_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bitnet-lightning"


def cache_folder() -> Path:
    """Where compiled kernels and tuned tiles are kept."""
    return cache_root() / "kernels"


def _openmp_of_torch() -> str | None:
    """Path of the OpenMP runtime in this process, if the system can tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*)", maps)
    return found.group(1) if found else None


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise CannotCompile("no C compiler found (cc, gcc, clang or $CC)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise CannotCompile(f"{Path(command[0]).name}: {first.strip()}")
    return done.stdout


def _build(compiler: str, flags: list[str], link_flags: list[str]) -> Path:
    digest = hashlib.sha256(platform.machine().encode())
    digest.update("\0".join([compiler, _run([compiler, "--version"]), *flags, "|", *link_flags]).encode())
    for file in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    library = cache_folder() / f"cpu-{digest.hexdigest()[:32]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects = []
            for source in sorted(SOURCES.glob("*.c")):
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                _run([compiler, *flags, "-c", str(source), "-o", objects[-1]])
            made = Path(folder) / library.name
            _run([compiler, "-shared", *objects, *link_flags, "-lm", "-o", str(made)])
            os.replace(made, library)
    except OSError as error:
        raise CannotCompile(f"{library.parent}: {error.strerror or error}") from error
    return library


def load_library() -> ctypes.CDLL:
    """Compile if needed and load. Raises ``CannotCompile``.

    Tried in turn: OpenMP calls answered by torch's runtime, by a runtime of our own, and no threads at all.
    """
    compiler = _compiler()
    attempts = [([*FLAGS, "-fopenmp"], ["-fopenmp"]), (FLAGS, [])]
    if runtime := _openmp_of_torch():
        ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
        attempts.insert(0, ([*FLAGS, "-fopenmp"], []))
    reasons = []
    for flags, link_flags in attempts:
        try:
            return ctypes.CDLL(str(_build(compiler, flags, link_flags)), os.RTLD_NOW)
        except (CannotCompile, OSError) as error:
            reasons.append(str(error))
    raise CannotCompile(reasons[-1])
