"""The house rules that a machine can check: style, types, layers, and what an import does."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff() -> None:
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


def test_mypy_strict() -> None:
    run("-m", "mypy")


def test_imports_run_downward() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())", PYTHONPATH=paths)


PROBE = """
import json, os, socket, subprocess, sys, time
def forbidden(*args, **kwargs): raise AssertionError("socket or process at import")
socket.socket.connect = socket.create_connection = subprocess.Popen.__init__ = os.system = forbidden
start = time.perf_counter(); import torch; middle = time.perf_counter(); import bitnet
for name in dir(bitnet):
    if name not in ("LitBitNet", "TokenDataModule"): getattr(bitnet, name)
end = time.perf_counter()
names = ("triton", "lightning", "datasets", "transformers", "matplotlib", "tensorboard")
print(json.dumps({
    "torch": middle - start, "bitnet": end - middle, "cuda": torch.cuda.is_initialized(),
    "loaded": [n for n in names if n in sys.modules],
}))
"""


def test_import_is_light_and_does_nothing(tmp_path) -> None:
    """Under twice the time of ``import torch``: what bitnet adds to it is less than torch itself."""
    best = min((json.loads(run("-c", PROBE, HOME=str(tmp_path))) for _ in range(3)), key=lambda r: r["bitnet"])
    assert best["bitnet"] < best["torch"]
    assert best["loaded"] == [] and not best["cuda"]
    assert list(tmp_path.iterdir()) == []


TRAIN = """
import socket, sys
def forbidden(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
import torch
from bitnet.training.cli import main
code = main(sys.argv[1:])
assert not torch.cuda.is_initialized()
assert torch.cuda.is_available() or "triton" not in sys.modules
raise SystemExit(code)
"""


def test_the_command_is_there_before_torch() -> None:
    loaded = run("-c", "import sys, bitnet.__main__; print(*sys.modules)").split()
    assert "bitnet.commands.sweep" in loaded and not {"torch", "numpy", "lightning"} & set(loaded)


def test_every_name_of_the_package_is_where_it_says() -> None:
    """As a type checker sees them, and as ``from bitnet import ...`` finds them."""
    tree = ast.parse((ROOT / "bitnet" / "__init__.py").read_text())
    typed = {
        alias.asname: (node.module, alias.name)
        for branch in tree.body if isinstance(branch, ast.If)
        for node in branch.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert len(typed) == 20 and set(typed) <= set(dir(bitnet))
    for name, (module, original) in typed.items():
        assert getattr(bitnet, name) is getattr(importlib.import_module(str(module)), original)
    with pytest.raises(AttributeError, match="no attribute 'Transfomer'"):
        _ = bitnet.Transfomer


def test_a_cpu_run_opens_no_connection_no_cuda_context_and_imports_no_triton(stories, tmp_path) -> None:
    options = ["fit", "--config", "overlays/smoke", f"--data.path={stories}", "--trainer.accelerator=cpu"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    run("-c", TRAIN, *options, f"--trainer.default_root_dir={tmp_path / 'run'}", PYTHONPATH=path)


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_triton_can_be_imported_after_our_imports() -> None:
    run("-c", "import bitnet.training.cli, triton, sys; assert sys.modules['triton'] is triton", PYTHONPATH=str(ROOT))


def python_files(*folders: str) -> list[Path]:
    return [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_has_grown_past_its_job() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in python_files("bitnet", "kernels")
        if (n := len(f.read_text().splitlines())) > 400
    }
    assert long == {}


def test_kernels_folder_is_no_package() -> None:
    """A top-level ``kernels`` package would hide the one of that name that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("file", python_files("kernels") + python_files("bitnet/layers"), ids=lambda f: f.name)
def test_new_tensors_say_their_dtype(file) -> None:
    """The default dtype is bf16 inside a bf16-true run: memory that C code fills must not depend on it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            made = getattr(node.func.value, "id", "") == "torch" and node.func.attr in ("empty", "zeros", "ones")
            meta = file.name in ("fake_quantized_linear.py", "lora_linear.py")
            assert not made or meta or "dtype" in {k.arg for k in node.keywords}, f"{file.name}:{node.lineno}"
