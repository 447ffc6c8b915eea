"""Scripts whose figures documents quote can still be started."""

from .conftest import ROOT
from .runs import run_python

IMPORT = """
import importlib, pathlib, sys
sys.path.insert(0, "benchmarks")
for file in sorted(pathlib.Path("benchmarks").glob("*.py")):
    print(importlib.import_module(file.stem).__name__)
"""


def test_every_script_finds_what_it_imports() -> None:
    """A name of the library that was changed is seen here."""
    done = run_python("-c", IMPORT)
    assert done.stdout.split() == sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
