"""One process of several that train the same small model; the first one writes what came out. Run by torchrun's rules.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python spread_worker.py OUT.pt mode [mode ...]

A mode is kind:layout:gather:ffn, as in ternary:fsdp:levels:64; layouts are ddp, fsdp, tp (all processes), tp2 (pairs;
the rest is data parallel).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet import BitNet, ModelConfig, Transformer
from bitnet.config import OptimConfig
from bitnet.layers import Arithmetic, low_bit_layers
from bitnet.layers.sharding import local_part
from bitnet.loss import next_token_loss
from bitnet.training.optim import build_optimizer
from bitnet.training.parallel import refresh, shard_model

ROWS, STEPS, LR = 8, 12, 3e-3


def new_model(kind: str, ffn: int) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=ffn, max_seq_len=32)
    model = Transformer(config)
    if kind == "grouped":
        BitNet(weight="binary", scale="rms", scale_per=32, learned_scale=True, mask_beyond=2.0).prepare(model)
        return model
    weight = kind if kind in ("binary", "none") else "ternary"
    BitNet(weight=weight, act_bits=8 if kind != "none" else "none").prepare(model)
    model.loss_chunk, model.recomputes_blocks = (50 if kind == "chunked" else None), kind == "recomputed"
    for layer in low_bit_layers(model).values() if kind == "int16" else ():
        layer.arithmetic = Arithmetic(input_gradient="int16", weight_gradient="int16")
    for layer in low_bit_layers(model).values() if kind == "blended" else ():
        layer.warmup = 0.5
    return model


def batches() -> list[dict[str, Tensor]]:
    """Rows with something to learn: each token is the one before it times 5 plus 1, or any other one time in five."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(96, (ROWS, 33), generator=generator)
        follow = torch.rand(ROWS, 33, generator=generator) < 0.8
        for t in range(1, 33):
            ids[:, t] = torch.where(follow[:, t], (ids[:, t - 1] * 5 + 1) % 96, ids[:, t])
        found.append({"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()})
    return found


def rows_of(batch: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    return {name: value.chunk(parts)[part] for name, value in batch.items()}


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "muon":
        return build_optimizer(model, OptimConfig(kind="muon", lr=LR, weight_decay=0.01))
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)


def whole(tensor: Any, like: Any = None) -> Tensor:
    """All of a spread tensor; ``like`` is the parameter whose pieces a plain tensor has."""
    if isinstance(like, DTensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class CountingCollectives(TorchDispatchMode):
    """Bytes of tensors that are sent inside, by the name of the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # to be seen again as what it does with its pieces
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.sent[name] = self.sent.get(name, 0) + tensors[-1].nbytes
        return out


@contextmanager
def counting_gathers() -> Iterator[list[int]]:
    """Bytes of each all-gather of tensors inside, all pieces together."""
    sizes: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.12
    original = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        sizes.append((args[0] if args else next(iter(kwargs.values()))).nbytes)
        return original(*args, **kwargs)

    setattr(dist, name, counted)
    try:
        yield sizes
    finally:
        setattr(dist, name, original)


def scale_of(layer: Any, spread: bool) -> Tensor:
    """The scale that a layer uses, of the whole matrix."""
    if spread and not layer.needs_whole_scale:
        return whole(layer.quantizer(local_part(layer.weight))[1].reciprocal(), layer.factor)
    return (layer.shared_scale if spread else layer.levels()).inv_scale


def run(kind: str, layout: str, gather: str, ffn: str) -> dict[str, Any]:
    world = dist.get_world_size()
    groups = {"tp": world, "tp2": 2}.get(layout, 1)
    model = new_model(kind, int(ffn))
    trained: nn.Module = model
    part, parts = dist.get_rank() // groups, world // groups
    if layout == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (parts, groups), mesh_dim_names=("data_parallel", "tensor_parallel"))
        shard_model(model, mesh)
    spread = layout != "ddp"
    optimizer = optimizer_of(model, kind)
    result: dict[str, Any] = {"losses": [], "clipped": []}
    for step, batch in enumerate(batches()[: 2 if kind == "muon" else STEPS]):
        if spread:
            refresh(model, gather)
        if step == 0:
            result["levels"], result["scales"], result["packed"] = {}, {}, 0
            for name, layer in low_bit_layers(model).items():
                here = layer.local_levels() if spread else layer.quantized_weight()[0]
                result["levels"][name] = whole(here, layer.weight)
                result["scales"][name] = scale_of(layer, spread)
                result["packed"] += layer.weight_holds_levels
        with counting_gathers() as gathered:
            loss = next_token_loss(trained, rows_of(batch, part, parts))
            loss.backward()
        result.setdefault("gathered", sum(gathered))
        if step == 0:
            result["gradients"] = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if kind == "muon":
            result["clipped"].append({name: whole(p.grad).clone() for name, p in model.named_parameters()})
        with CountingCollectives() as collectives:
            optimizer.step()
        result["sent"] = collectives.sent
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        result["losses"].append(float(mean) / world)
    result["weights"] = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return result


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {mode: run(*mode.split(":")) for mode in sys.argv[2:]}
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
