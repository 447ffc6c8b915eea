"""What api.h declares, as ctypes knows it: read from that file, so Python and the C compiler see one declaration."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

API = Path(__file__).with_name("api.h")
_NUMBERS = {"int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


class Function(NamedTuple):
    """``void`` gives ``None``; every pointer is an address, ``c_void_p``."""

    result: Any
    parameters: dict[str, Any]


class Declarations(NamedTuple):
    """By name."""

    functions: dict[str, Function]
    structures: dict[str, type[ctypes.Structure]]


def parse(text: str) -> Declarations:
    """The functions and structures of a header that keeps to the rules at the head of api.h; else ``KeyError``."""
    functions: dict[str, Function] = {}
    structures: dict[str, type[ctypes.Structure]] = {}
    types: dict[str, Any] = dict(_NUMBERS)

    def named(declaration: str) -> dict[str, Any]:
        """``const float *x, *y`` -> the type of each name."""
        kind, names = declaration.removeprefix("const ").split(" ", 1)
        pointer = ctypes.c_void_p
        return {name.lstrip("*"): pointer if name.startswith("*") else types[kind] for name in names.split(", ")}

    text = " ".join(line for line in re.sub(r"//.*", "", text).splitlines() if not line.startswith("#"))
    text = re.sub(r"\s+", " ", text)
    for fields, struct, result, function, parameters in re.findall(
        r"typedef struct \{ (.*?); \} (\w+);|(\w+) (\w+)\( ?(.*?)\);", text
    ):
        if struct:
            members = [member for field in fields.split("; ") for member in named(field).items()]
            types[struct] = structures[struct] = type(struct, (ctypes.Structure,), {"_fields_": members})
        else:
            given = {} if parameters == "void" else dict(i for p in parameters.split(", ") for i in named(p).items())
            functions[function] = Function(None if result == "void" else types[result], given)
    return Declarations(functions, structures)


@functools.cache
def declarations() -> Declarations:
    """Those of api.h."""
    return parse(API.read_text(encoding="utf-8"))
