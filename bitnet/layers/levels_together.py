"""The levels of all weights of a model at once, before a training step on a GPU.

Asked one after another, each layer has its weight quantized by kernels of its own, and launching them takes the CPU
longer than computing takes the GPU.
"""

from collections.abc import Collection

from bitnet.layers.bit_linear import BitLinear
from bitnet.layers.integer_products import Levels


def hold_levels(layers: Collection[BitLinear]) -> None:
    """From here to ``release_levels`` no weight changes: let each be quantized once, on a GPU all of them now.

    A layer whose gradient reads levels transposed makes them itself.
    """
    for layer in layers:
        layer.hold(True)
    waiting = [
        layer
        for layer in layers
        if type(layer) is BitLinear
        and layer.phase != "float"
        and layer.holds_nothing
        and layer.is_on_gpu_as_a_whole
        and layer.arithmetic.input_gradient == "float"
    ]
    for kind in ("ternary", "binary"):
        if group := [layer for layer in waiting if layer.weight_kind == kind]:
            from bitnet_kernels.triton_levels import quantize_matrices

            parts, scales = quantize_matrices([layer.weight.detach() for layer in group], kind == "binary")
            for layer, q, inv_scale in zip(group, parts, scales[:, 0].unbind(), strict=True):
                layer.keep(Levels(q, inv_scale))


def release_levels(layers: Collection[BitLinear]) -> None:
    """Weights may change again."""
    for layer in layers:
        layer.hold(False)
