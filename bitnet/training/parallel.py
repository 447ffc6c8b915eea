"""A transformer over several processes: which matrix is cut how, and what travels between the pieces.

With tensor parallelism each block is cut between its heads and between the units of its feed-forward network: wq wk wv
w1 w3 by outputs, wo and w2 by inputs (arXiv 1909.08053). Two sums of exact integers per block travel forward, and
the gradients of the two norms' outputs travel back. Sub-norms see a slice of their input and add up its mean square.
Embedding and head are cut by tokens of the vocabulary. FSDP2 then spreads what each process holds over the others,
block by block.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.layers import BitLinear, low_bit_layers, swap_linears
from bitnet.layers.sharding import Split, gather_levels, share_scales
from bitnet.model import RMSNorm, Transformer


def check_tensor_parallel(config: ModelConfig, devices: int) -> None:
    """Refuse sizes that cannot be shared out over ``devices``."""
    sizes = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads, "ffn_dim": config.ffn_dim}
    for name, size in sizes.items():
        if size % devices:
            raise UserError(
                f"trainer.strategy.tensor_parallel = {devices}: model.config.{name} = {size} is not a multiple of it."
            )


def check_split_layer(name: str, layer: BitLinear) -> None:
    """Refuse what a layer that is cut by inputs cannot compute as a whole one would."""
    if layer.weight_kind == "none" and layer.act_bits == "none":
        return
    if layer.transform != "none":
        raise UserError(
            f"{name}: transform = {layer.transform} needs all inputs of a token; not with tensor parallelism."
        )
    if layer.act_bits != 8:
        raise UserError(
            f"{name}: act_bits = {layer.act_bits}; under tensor parallelism wo and w2 take 8-bit activations."
        )


def check_groups(name: str, layer: BitLinear, inputs: int) -> None:
    """Refuse scales that a process which holds ``inputs`` inputs of some rows cannot find by itself."""
    if not layer.needs_whole_scale and (not isinstance(layer.scale_per, int) or inputs % layer.scale_per):
        raise UserError(
            f"{name}: scale_per = {layer.scale_per}; tensor parallelism takes groups that divide the {inputs} inputs "
            "of a device, or scale = absmean of the matrix without learned_scale and mask_beyond."
        )


def _cut(layer: BitLinear, mesh: DeviceMesh, dim: Any) -> None:
    placement = Shard(0) if dim == "outputs" else Shard(1)
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    layer.split = Split(dim, mesh.get_group())


def _norm(norm: RMSNorm, mesh: DeviceMesh, sees: Placement, gradient: Placement) -> None:
    """A norm whose local input is ``sees`` of the whole, and whose output's gradient arrives as ``gradient``."""

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            placement = Shard(0) if sees.is_shard() else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))

    def inputs(module: nn.Module, args: Any, mesh: DeviceMesh) -> Any:
        return (DTensor.from_local(args[0], mesh, [sees], run_check=False), *args[1:])

    def outputs(module: nn.Module, out: Any, mesh: DeviceMesh) -> Any:
        return out.redistribute(placements=[sees]).to_local(grad_placements=[gradient])

    norm.training_kernel = None  # it knows nothing of slices
    distribute_module(norm, mesh, partition, inputs, outputs)


def cut_tensors(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor parallelism over ``mesh``; the model's float linears become ``BitLinear`` of kind none."""
    devices = mesh.size()
    check_tensor_parallel(model.config, devices)
    blocks: Any = model.layers

    def local(name: str, linear: nn.Linear) -> nn.Module:
        return linear if isinstance(linear, BitLinear) else BitLinear.from_linear(linear, "none", "none")

    swap_linears(blocks, local)
    last = Shard(2)  # of (B, T, features)
    for number, block in enumerate(blocks):
        attention, feed_forward = block.attention, block.feed_forward
        for layer in (attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3):
            check_groups(f"layers.{number}", layer, layer.in_features)
            _cut(layer, mesh, "outputs")
        for name, layer in (("attention.wo", attention.wo), ("feed_forward.w2", feed_forward.w2)):
            check_split_layer(f"layers.{number}.{name}", layer)
            check_groups(f"layers.{number}.{name}", layer, layer.in_features // devices)
            _cut(layer, mesh, "inputs")
        attention.n_heads //= devices
        attention.n_kv_heads //= devices
        for norm in (block.attention_norm, block.ffn_norm):
            _norm(norm, mesh, Replicate(), Partial())
        for norm in (attention.attn_sub_norm, feed_forward.ffn_sub_norm):
            if isinstance(norm, RMSNorm):
                _norm(norm, mesh, last, last)
    _norm(model.norm, mesh, Replicate(), Replicate())
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.tok_embeddings.weight


def shard_model(model: Transformer, mesh: DeviceMesh) -> None:
    """Spread ``model`` over the mesh ("data_parallel", "tensor_parallel")."""
    from torch.distributed.fsdp import fully_shard

    if min(mesh.shape) > 1:
        mesh._flatten()  # so that what is summed over both dimensions is summed once
    if mesh["tensor_parallel"].size() > 1:
        cut_tensors(model, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1 or mesh["tensor_parallel"].size() == 1:
        for block in model.layers:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
        for layer in low_bit_layers(model).values():
            layer.passes_by = True


def refresh(model: nn.Module, gather: str) -> None:
    """Before the first forward with new weights: the scales of whole matrices, and what FSDP2 gathers."""
    layers = low_bit_layers(model).values()
    share_scales(layers)
    if gather == "levels":
        gather_levels(layer for layer in layers if layer.passes_by)
