"""P1, P3: bounds of dependencies, and what is in the wheel."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.scorecard.conftest import ROOT

FLOORS = {"torch": "2.10", "lightning": "2.6.6", "jinja2": "3.1.5"}
"""Below these: memory corruption in the unpickler, uploads that stole credentials, an escape from the sandbox."""
BAD = {"torch": ("2.5.1", "2.9.1"), "lightning": ("2.6.2", "2.6.3", "2.6.5"), "jinja2": ("3.1.4",)}
CEILED = ("torch", "lightning", "jinja2", "jsonargparse")
"""What is named here follows inner workings of these, or trusts them with files: a new major version is tried first."""


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    found = [Requirement(text) for text in (*project["dependencies"], *extras)]
    return {requirement.name.lower(): requirement for requirement in reversed(found)}


@pytest.mark.check(
    "P1", "dependencies have floors above known holes, ceilings, and installed versions between them", 30
)
def test_bounds(tally) -> None:
    wanted = requirements()
    for name, floor in FLOORS.items():
        specifier = wanted[name].specifier
        lowest = [Version(s.version) for s in specifier if s.operator in (">=", "==", "~=")]
        tally(bool(lowest) and max(lowest) >= Version(floor), f"{name}{specifier}: below {floor}")
        for version in BAD[name]:
            tally(version not in specifier, f"{name}{specifier}: allows {version}")
    for name in CEILED:
        tally(any(s.operator in ("<", "==", "~=") for s in wanted[name].specifier), f"{name}: has no ceiling")
    for name, requirement in wanted.items():
        if name in ("xllamacpp", "bitnet-lightning"):
            continue  # asked in a process of its own to check an export | this project
        tally(any(s.operator in (">=", "==") for s in requirement.specifier), f"{requirement}: has no floor")
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
            tally(requirement.specifier.contains(version, prereleases=True), f"{name} {version} is not {requirement}")


TYPES = {".py", ".yaml", ".c", ".h", ".typed", ""}
"""What a wheel may hold; the last is for METADATA and its like."""
LARGEST = 1 << 20


def build(folder: Path) -> Path:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", str(folder), str(ROOT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
@pytest.mark.check(
    "P3", "the wheel holds known types of small files, only ours, and two builds have the same bytes", 150
)
def test_wheel(tmp_path, tally) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel")
    wheels = [build(tmp_path / name) for name in ("a", "b")]
    tally(wheels[0].read_bytes() == wheels[1].read_bytes(), "two builds differ")
    with zipfile.ZipFile(wheels[0]) as content:
        parts = content.infolist()
    names = {part.filename for part in parts}
    for part in parts:
        path = Path(part.filename)
        told = ".dist-info/" in part.filename
        known = (told or path.suffix in TYPES - {""}) and part.file_size <= LARGEST
        ours = told or part.filename.startswith(("bitnet/", "bitnet_kernels/"))
        link = part.external_attr >> 28 == 0o12
        tally(known and ours and not link and ".." not in path.parts, f"{part.filename}, {part.file_size} bytes")
    source = [
        *((ROOT / "bitnet").rglob("*.py")),
        *((ROOT / "kernels").rglob("*.py")),
        *((ROOT / "kernels").rglob("*.[ch]")),
    ]
    missing = {str(file.relative_to(ROOT)).removeprefix("kernels/") for file in source} - names
    tally(not missing, f"not in the wheel: {sorted(missing)[:3]}")
    tally((ROOT / "SECURITY.md").is_file(), "SECURITY.md")
