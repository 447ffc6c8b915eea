"""A step of Muon on matrices that are spread over processes, each of which makes whole ones orthogonal.

torch's Muon takes spread matrices too, and gathers each of them in each of its iterations: up to 30 bytes a weight.
Here every matrix has an owner. The pieces of its update travel there in bfloat16, in which the iterations compute
anyway, and those of the result travel back: 4 bytes for each weight that a process holds, and the bits of one process.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def can_be_dealt_out(parameters: list[Any]) -> bool:
    """Whether all of them are cut along one dimension of one mesh: by FSDP2 or by tensor parallelism, not by both."""
    spread = [p for p in parameters if isinstance(p, DTensor)]
    meshes = {p.device_mesh for p in spread}
    return len(spread) == len(parameters) and len(meshes) == 1 and next(iter(meshes)).ndim == 1


@torch.no_grad()
def spread_step(group: dict[str, Any], state: Any) -> None:
    """One step for the parameters of ``group`` (of ``torch.optim.Muon``), whose momentum is in ``state``."""
    lr, momentum = group["lr"], group["momentum"]
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    updates = []
    for p in parameters:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        updates.append(update.to_local().bfloat16())
    for p, step in zip(parameters, _orthogonal_pieces(updates, parameters), strict=True):
        adjusted = lr * (0.2 * math.sqrt(max(p.shape)))
        p.to_local().mul_(1 - lr * group["weight_decay"]).add_(step, alpha=-adjusted)


def _orthogonal_pieces(pieces: list[Tensor], parameters: list[Any]) -> Iterator[Tensor]:
    """What becomes of this process's ``pieces`` of updates when each whole update is made orthogonal by its owner."""
    mesh: DeviceMesh = parameters[0].device_mesh
    n, me = mesh.size(), mesh.get_local_rank()
    dims = [p.placements[0].dim for p in parameters]

    def piece_shape(number: int, rank: int) -> tuple[int, int]:
        """Of what ``rank`` holds of a matrix, with the dimension that is cut put first."""
        (whole, other), dim = parameters[number].shape, dims[number]
        whole, other = (whole, other) if dim == 0 else (other, whole)
        each = -(-whole // n)
        return max(0, min(whole - rank * each, each)), other

    owned = [range(rank, len(parameters), n) for rank in range(n)]  # matrices are dealt out in turn
    there = [[piece_shape(number, me) for number in owned[rank]] for rank in range(n)]
    here = [[piece_shape(number, rank) for number in owned[me]] for rank in range(n)]
    sent = [[pieces[number].transpose(0, dims[number]) for number in owned[rank]] for rank in range(n)]
    received = _exchange(sent, here, mesh, pieces[0])
    back: list[list[Tensor]] = [[] for _ in range(n)]
    for place, number in enumerate(owned[me]):
        whole = torch.cat([received[rank][place] for rank in range(n)])
        step = _orthogonal(whole.transpose(0, dims[number]).contiguous()).transpose(0, dims[number])
        for rank, piece in enumerate(step.split([here[rank][place][0] for rank in range(n)])):
            back[rank].append(piece)
    returned = _exchange(back, there, mesh, pieces[0])
    for number, dim in enumerate(dims):
        yield returned[number % n][number // n].transpose(0, dim)


def _exchange(
    to: list[list[Tensor]], shapes: list[list[tuple[int, int]]], mesh: DeviceMesh, like: Tensor
) -> list[list[Tensor]]:
    """Send ``to[r]`` to process r; return what arrives from each, which has ``shapes[r]``. Two bytes a number."""
    sent = torch.cat([t.bfloat16().flatten() for each in to for t in each] or [like.new_empty(0)])
    in_all = [sum(a * b for a, b in each) for each in shapes]
    arrived = like.new_empty(sum(in_all))
    as_bytes = arrived.view(torch.uint8), sent.view(torch.uint8)  # not every backend knows bfloat16
    out_splits, in_splits = [2 * count for count in in_all], [2 * sum(t.numel() for t in each) for each in to]
    dist.all_to_all_single(*as_bytes, out_splits, in_splits, group=mesh.get_group())
    flat = iter(arrived.split([a * b for each in shapes for a, b in each]))
    return [[next(flat).view(shape) for shape in each] for each in shapes]


def _orthogonal(update: Tensor) -> Tensor:
    """What torch's Muon makes of a matrix: what a step of rate 1 takes from zeros. (That of a tall one it scales.)"""
    tall = update.shape[0] > update.shape[1]
    gradient = (update.t() if tall else update).float()
    nothing = torch.zeros_like(gradient, requires_grad=True)
    nothing.grad = gradient
    torch.optim.Muon([nothing], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    step = -nothing.detach()
    return step.t() if tall else step
