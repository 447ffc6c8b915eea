"""The operators of int8 training as torch sees them: schema, shapes without data, export, full graphs, refusals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_kernels import rms_norm_quantize, training_ops
from bitnet_kernels.training_ops import GRADIENT_FLOOR, MAX_INT8_K
from tests.kernels.conftest import random_int8
from tests.kernels.test_ops import CHECKS, OPS

X, W, ROWS = torch.randn(5, 30), torch.randn(7, 30), torch.rand(5) + 0.1
A, B, ONE = random_int8(5, 30, 0), random_int8(7, 30, 1), torch.ones(())

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("int8_matmul", (A, B, ROWS, ONE, torch.bfloat16)),
    ("int8_matmul", (A, B, ROWS, None, None)),
    ("quantize_rows", (X, True, 1e-5)),
    ("quantize_rows", (X.bfloat16(), False, GRADIENT_FLOOR)),
    ("quantize_columns", (X, ROWS, GRADIENT_FLOOR)),
    ("quantize_columns", (X.t(), None, 1e-5)),
    ("quantize_columns", (torch.empty(0, 3), None, 1e-5)),
    ("ternary_weight", (W, ONE)),
    ("binary_weight", (W.bfloat16(), ONE)),
    ("norm_quantize", (X, torch.ones(30), 1e-5, True)),
    ("norm_quantize", (X.bfloat16(), torch.ones(30), 1e-5, False)),
    ("rms_norm_backward", (X, X.bfloat16(), torch.ones(30), ROWS)),
]


@pytest.mark.parametrize("name, arguments", CALLS, ids=[f"{name}{i}" for i, (name, _) in enumerate(CALLS)])
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(OPS, name), arguments, test_utils=CHECKS)
    direct, dispatched = getattr(training_ops, name)(*arguments), getattr(OPS, name)(*arguments)
    if isinstance(direct, Tensor):
        direct, dispatched = (direct,), (dispatched,)
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("name", ["quantize_rows", "ternary_weight", "binary_weight", "norm_quantize"])
def test_results_lie_as_their_shapes_say(name: str) -> None:
    """Those of a transposed matrix, too: a compiled graph counts on it."""
    rest = {"quantize_rows": (), "norm_quantize": (torch.ones(30), 1e-5)}.get(name, (ONE,))
    found = getattr(training_ops, name)(torch.randn(30, 5).t(), *rest)
    assert all(part.is_contiguous() for part in found)
    assert all(part.is_contiguous() for part in rms_norm_quantize(torch.randn(30, 5).t().bfloat16(), None))


class Gradients(nn.Module):
    """Forward and both gradients of a low-bit layer behind a norm, as operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", W)
        self.register_buffer("one", ONE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, x_q, s_x, rstd, x_q_t = training_ops.norm_quantize(x, torch.ones(30), 1e-5, True)
        w_q, w_q_t = training_ops.ternary_weight(self.w, self.one)
        y = training_ops.int8_matmul(x_q, w_q, s_x, self.one)
        dy_q, s_dy, _ = training_ops.quantize_rows(y, floor=GRADIENT_FLOOR)
        dx = training_ops.int8_matmul(dy_q, w_q_t, s_dy, self.one)
        dy_q_t, s_columns = training_ops.quantize_columns(y, s_x)
        dx, _ = training_ops.rms_norm_backward(dx, x, torch.ones(30), rstd)
        return y, dx, training_ops.int8_matmul(dy_q_t, x_q_t, s_columns)


def test_export_with_any_number_of_tokens() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    layer = Gradients()
    program = torch.export.export(layer, (torch.randn(4, 30),), dynamic_shapes={"x": {0: tokens}})
    for m in (2, 3, 65):
        x = torch.randn(m, 30)
        assert all(torch.equal(a, b) for a, b in zip(program.module()(x), layer(x), strict=True))


COMPILE = """
import torch
from tests.kernels.test_training_registration import Gradients

layer, graphs = Gradients(), []

def backend(module, inputs):
    graphs.append([str(node.target) for node in module.graph.nodes])
    return module

x = torch.randn(4, 30)
found = torch.compile(layer, fullgraph=True, backend=backend)(x)
assert all(torch.equal(a, b) for a, b in zip(found, layer(x)))
assert len(graphs) == 1, graphs
assert sum("bitnet_kernels" in name for name in graphs[0]) == 8, graphs
"""


def test_full_graph_compile() -> None:
    """In a process of its own: the tests switch torch's compiler off for transformers' sake."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("int8_matmul", (A.float(), B, ROWS), "must be int8"),
        ("int8_matmul", (A, B[:, :3], ROWS), "same K"),
        ("int8_matmul", (A, B, ROWS[:2]), "row_inv_scale must be float32 with 5 values"),
        ("int8_matmul", (A, B, ROWS, ROWS), "inv_scale must be float32 with 1 values"),
        ("int8_matmul", (A, B, ROWS.double()), "must be float32"),
        ("int8_matmul", (A, B, ROWS, None, torch.int32), "out_dtype"),
        ("quantize_rows", (A,), "must be floating"),
        ("quantize_rows", (X, False, 1e-40), "floor"),
        ("quantize_columns", (X[:, :0],), "no columns"),
        ("quantize_columns", (X, ROWS[:1]), "row_inv_scale"),
        ("ternary_weight", (W, ROWS), "1 values"),
        ("binary_weight", (W[:0], ONE), "no rows"),
        ("norm_quantize", (X, torch.ones(3), 1e-5), "weight of the norm"),
        ("rms_norm_backward", (X[:2], X, torch.ones(30), ROWS), "dy must be"),
        ("rms_norm_backward", (X, X, torch.ones(30), ROWS[:1]), "rstd"),
    ],
)
def test_what_is_not_supported_raises(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(training_ops, name)(*arguments)


def test_sums_that_could_leave_int32_are_refused() -> None:
    a = torch.full((1, MAX_INT8_K), -128, dtype=torch.int8)
    total = training_ops.int8_matmul(a, -127 * torch.ones_like(a), torch.ones(1))
    assert float(total) == float(torch.tensor(127 * 128 * MAX_INT8_K).float())
    a = torch.zeros(1, MAX_INT8_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="int32 sums end"):
        training_ops.int8_matmul(a, a, torch.ones(1))


def test_no_tokens() -> None:
    none = torch.empty(0, 30)
    assert training_ops.int8_matmul(A[:0], B, ROWS[:0]).shape == (0, 7)
    assert [tuple(t.shape) for t in training_ops.quantize_rows(none, True)] == [(0, 30), (0,), (30, 0)]
    q_t, inv_scale = training_ops.quantize_columns(none)
    assert q_t.shape == (30, 0)
    assert inv_scale.isfinite().all()
    dx, dweight = training_ops.rms_norm_backward(none, none, torch.ones(30), ROWS[:0])
    assert dx.shape == (0, 30)
    assert not dweight.any()
