"""Integer-grid models in the layout of ``compressed-tensors``, which transformers and vLLM read.

=================== ======================================================================================
``pack-quantized``  symmetric weights alone: ``weight_packed`` int32 (N, ceil(K b / 32)), codes of b bits one
                    after another, lowest bits first; ``weight_scale`` (N, G); ``weight_shape`` (2,)
``int-quantized``   8-bit weights and activations: ``weight`` int8 (N, K), ``weight_scale`` (N, 1) or (1,),
                    and for static activations ``input_scale`` (1,)
``naive-quantized`` weights with zero points: ``weight`` int8 (N, K) and ``weight_zero_point`` int8 (N, G),
                    both less 2^(b - 1); a byte for every weight, since transformers 5 cannot read packed
                    zero points (it makes room for unpacked ones)
=================== ======================================================================================

Codes count from the lowest integer of b bits. Readers scale 8-bit activations by max|x| / 127.5 where this library
has 127 (SmoothQuant's), so that their activations differ by half a step; weights are equal.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.affine import Scheme
from bitnet.errors import UserError
from bitnet.interchange.names import HUGGING_FACE
from bitnet.layers import FakeQuantizedLinear, LoRALinear, quantized_layers
from bitnet.layers.activation_quantizer import ActivationScheme
from bitnet.model import Transformer


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 (N, K) codes below 2^bits -> int32 (N, ceil(K * bits / 32)): a stream of bits, lowest first."""
    array = codes.cpu().numpy()
    stream = np.unpackbits(array[..., None], axis=-1, count=bits, bitorder="little").reshape(len(array), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32))


def obstacle(model: Transformer) -> str | None:
    """Why this layout cannot hold the model, or ``None``."""
    layers = quantized_layers(model)
    if not layers:
        return "it holds weights on an integer grid; this model has none"
    forms = set()
    for name, layer in layers.items():
        if not isinstance(layer.grid, Scheme):
            return f"{name} has NormalFloat levels, which are no integers"
        if layer.outlier_at is not None or layer.outlier_threshold is not None:
            return f"{name} computes some weights or inputs in floating point"
        if layer.output is not None:
            return f"{name} quantizes its output, which a linear layer there cannot"
        if isinstance(layer, LoRALinear):
            return f"{name} has an adapter (or zero points that are no integers); export it with --format peft"
        if layer.bias is not None:
            return f"{name} has a bias"
        act = None if layer.act is None else layer.act.scheme
        if act is not None and act.scale == "tensor":
            return f"{name} has one activation scale a call, which is computed nowhere else"
        forms.add((layer.grid, act))
    if len(forms) > 1:
        return "its layers differ"
    return None


def _as_args(bits: int, symmetric: bool, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **others}


def quantization_config(model: Transformer) -> dict[str, Any]:
    """The entry of config.json."""
    layer = next(iter(quantized_layers(model).values()))
    grid, act = layer.grid, None if layer.act is None else layer.act.scheme
    assert isinstance(grid, Scheme)
    size = grid.group_size if grid.granularity == "group" else None
    format = _format(grid, act)
    activations = None
    if act is not None:
        strategy = "tensor" if act.scale == "static" else "token"
        activations = _as_args(act.bits, True, strategy=strategy, dynamic=act.scale != "static")
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _as_args(
                    grid.bits, grid.symmetric, strategy=grid.granularity, group_size=size, dynamic=False
                ),
                "input_activations": activations,
                "output_activations": None,
                "format": format,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _format(grid: Scheme, act: ActivationScheme | None) -> str:
    if not grid.symmetric:
        return "naive-quantized"
    return "int-quantized" if act is not None and grid.bits == 8 else "pack-quantized"


def tensors_of(name: str, layer: FakeQuantizedLinear) -> dict[str, Tensor]:
    """What stands for the layer at our path ``name``; scales in float32, so that no reader rounds them again."""
    grid, act = layer.grid, layer.act
    assert isinstance(grid, Scheme)
    theirs = HUGGING_FACE.theirs(name)
    q, scale, zero_point = layer.parts()
    scales = scale.flatten(1)
    found = {f"{theirs}.weight_scale": scales.flatten() if grid.granularity == "tensor" else scales}
    if act is not None and act.limits is not None:
        found[f"{theirs}.input_scale"] = act.limits.abs().amax().reshape(1) / act.scheme.qmax
    format = _format(grid, None if act is None else act.scheme)
    if format == "int-quantized":
        return {**found, f"{theirs}.weight": q.to(torch.int8)}
    middle = 1 << grid.bits - 1
    if format == "naive-quantized":
        found[f"{theirs}.weight"] = (q.to(torch.int16) - middle).to(torch.int8)
        found[f"{theirs}.weight_zero_point"] = (zero_point.flatten(1).to(torch.int16) - middle).to(torch.int8)
        return found
    found[f"{theirs}.weight_packed"] = pack_bits((q.to(torch.int16) + middle).to(torch.uint8), grid.bits)
    found[f"{theirs}.weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    return found


def check(model: Transformer) -> None:
    """Raises ``UserError`` where this layout cannot hold the model."""
    if why := obstacle(model):
        raise UserError(f"--form compressed-tensors: {why}.")
