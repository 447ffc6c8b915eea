"""The operators as torch sees them: schema, shapes without data, export with any number of tokens, full graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitnet_kernels import FORMATS, ops, packed_matmul, rms_norm_quantize
from tests.kernels.conftest import random_int8, random_levels

OPS = torch.ops.bitnet_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def problem(format: str = "ternary2") -> tuple[Tensor, Tensor]:
    return random_int8(5, 300, 0), FORMATS[format].pack(random_levels(format, 17, 300, 1))


@pytest.mark.parametrize("format", ["ternary2", "binary1"])
def test_opcheck(format: str) -> None:
    x, packed = problem(format)
    scales = torch.rand(5, 1) + 0.1, torch.rand(17) + 0.1
    torch.library.opcheck(OPS.packed_matmul, (x, packed, format, 17, 300), test_utils=CHECKS)
    torch.library.opcheck(OPS.packed_matmul, (x, packed, format, 17, 300, *scales), test_utils=CHECKS)
    grouped = {"group_scale": torch.rand(17, 5), "group_size": 64, "out_dtype": torch.bfloat16}
    torch.library.opcheck(OPS.packed_matmul, (x, packed, format, 17, 300), grouped, test_utils=CHECKS)
    floats = torch.randn(5, 300)
    torch.library.opcheck(OPS.rms_norm_quantize, (floats, torch.ones(300), 1e-5), test_utils=CHECKS)
    torch.library.opcheck(OPS.rms_norm_quantize, (floats, None, 0.0), test_utils=CHECKS)


def test_arguments_may_be_left_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands over to an implementation only what differs from the defaults of the schema."""
    triton_matmul = pytest.importorskip("bitnet_kernels.triton_matmul")
    monkeypatch.setattr(triton_matmul, "packed_matmul", lambda *arguments: arguments)
    given = (*problem(), "ternary2", 17, 300)
    assert ops._packed_matmul_cuda(*given) == given
    with pytest.raises(ValueError, match="k = 0"):
        ops._packed_matmul_cuda(*given[:4], 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", problem()[1])
        self.register_buffer("inv_scale", torch.tensor([17.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, inv_scale, row_sum = rms_norm_quantize(x, torch.ones(300), 1e-5)
        return packed_matmul(
            q, self.packed, n=17, k=300, x_inv_scale=inv_scale, w_inv_scale=self.inv_scale, row_sum=row_sum
        )


def test_the_dispatcher_gives_what_the_direct_call_gives() -> None:
    x, packed = problem()
    direct = packed_matmul(x, packed, n=17, k=300)
    assert torch.equal(OPS.packed_matmul(x, packed, "ternary2", 17, 300), direct)


def test_export_with_any_number_of_tokens() -> None:
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    layer = Layer()
    program = torch.export.export(layer, (torch.randn(4, 300),), dynamic_shapes={"x": {0: tokens}})
    for m in (1, 3, 65):
        x = torch.randn(m, 300)
        assert torch.equal(program.module()(x), layer(x))


COMPILE = """
import torch
from tests.kernels.test_ops import Layer

layer, graphs = Layer(), []

def backend(module, inputs):
    graphs.append([str(node.target) for node in module.graph.nodes])
    return module

x = torch.randn(4, 300)
assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
assert len(graphs) == 1, graphs
assert sum("bitnet_kernels" in name for name in graphs[0]) == 2, graphs
"""


def test_full_graph_compile() -> None:
    """In a process of its own: the tests switch torch's compiler off for transformers' sake."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
