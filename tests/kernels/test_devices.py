"""Kernels are launched where their tensors are, whichever device is current."""

import ast
from pathlib import Path

import pytest
import torch

import bitnet_kernels
from bitnet_kernels.devices import on_its_device

FOLDER = Path(bitnet_kernels.__file__).parent


@pytest.mark.parametrize("given", [torch.ones(1), [torch.ones(1), torch.zeros(1)]], ids=["tensor", "list"])
def test_the_device_of_the_first_argument_is_current(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = []

    class Watched(torch.cuda.device_of):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            current.append(tensor)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Watched)
    seen = on_its_device(lambda first, more: [*current, more])(given, 3)
    assert seen == [given[0] if isinstance(given, list) else given, 3] and current == []


def decorated(module: Path) -> dict[str, bool]:
    """Functions of a module, inner ones too -> whether they are decorated."""
    functions = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef)]
    return {f.name: any(getattr(d, "id", "") == "on_its_device" for d in f.decorator_list) for f in functions}


def launching(module: Path) -> set[str]:
    """Functions of a module that launch a kernel, or call one in it that does, and are not decorated."""
    functions = {f.name: f for f in ast.parse(module.read_text()).body if isinstance(f, ast.FunctionDef)}
    calls = {
        name: {n.func for n in ast.walk(function) if isinstance(n, ast.Call)} for name, function in functions.items()
    }
    bare = {name for name, of in calls.items() if any(isinstance(f, ast.Subscript) for f in of)}
    bare -= {name for name, is_decorated in decorated(module).items() if is_decorated}
    for _ in functions:  # whoever calls one of these
        bare |= {name for name, of in calls.items() if any(getattr(f, "id", "") in bare for f in of)}
        bare -= {name for name, is_decorated in decorated(module).items() if is_decorated}
    return bare


def test_whoever_launches_is_called_with_the_device_set() -> None:
    """By itself, or by the operator in ``ops`` and ``training_ops`` in front of it."""
    behind_operators = {"triton_matmul", "triton_int8", "triton_training"}
    bare = {file.stem: names for file in sorted(FOLDER.glob("triton_*.py")) if (names := launching(file))}
    assert bare.keys() == behind_operators | {"triton_norm"}
    # Of these only the operators know; model.py calls rms_norm, which sets the device itself.
    assert bare["triton_norm"] == {"_launch", "rms_norm_quantize", "quantize", "norm_quantize", "rms_norm_backward"}
    operators = decorated(FOLDER / "ops.py") | decorated(FOLDER / "training_ops.py")
    assert all(operators[name] for name in ("_packed_matmul_cuda", "_rms_norm_quantize_cuda", "on_cuda"))
