"""Print every dependency of the project at the lowest version that pyproject.toml allows, as constraints for pip.

    python tests/lowest_versions.py [NAME ...] > lowest.txt

Packages that are named are left free: ``torch``, say, where only another build of it is at hand.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

USERS = ("hf", "gguf", "eval", "sweep")
"""Extras that are for users; what only developers need may be as new as it likes."""


def lowest(project: dict[str, object], free: set[str]) -> list[str]:
    """``name==floor`` of each requirement that has a floor."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict) and isinstance(project["dependencies"], list)
    found = []
    for text in (*project["dependencies"], *(text for extra in USERS for text in extras[extra])):
        requirement = Requirement(text)
        floor = next(s.version for s in requirement.specifier if s.operator == ">=")
        if requirement.name not in free:
            found.append(f"{requirement.name}=={floor}")
    return found


if __name__ == "__main__":
    file = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(lowest(tomllib.loads(file.read_text(encoding="utf-8"))["project"], set(sys.argv[1:]))))
