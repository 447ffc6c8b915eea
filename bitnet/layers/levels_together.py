"""The levels of all weights of a model at once, before a training step on a GPU.

Asked one after another, each layer has its weight quantized by kernels of its own, and launching them takes the CPU
longer than computing takes the GPU.
"""

from collections.abc import Iterable

from bitnet.layers.bit_linear import BitLinear
from bitnet.layers.integer_products import Levels


def quantize_together(layers: Iterable[BitLinear]) -> None:
    """Let the ``layers`` that are about to need levels, and keep them (``hold``), have them. Off a GPU there are none.

    A layer whose gradient reads levels transposed makes them itself.
    """
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
