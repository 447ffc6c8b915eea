"""N: numbers are right at the edges."""

import pytest
import torch

from bitnet.quantizers import quantize_int4_absmean, quantize_int8_absmax
from bitnet.scale_rules import ScaledQuantizer


@pytest.mark.check("N2", "NaN and infinity never become finite results", 100)
def test_not_finite(tally) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        x = torch.randn(4, 64, generator=generator)
        row, column = (int(torch.randint(n, (1,), generator=generator)) for n in x.shape)
        x[row, column] = (float("nan"), float("inf"), -float("inf"))[trial % 3]
        found = []
        for quantize in (quantize_int8_absmax, quantize_int4_absmean):
            q, inv_scale = quantize(x)
            found.append(bool((q / inv_scale)[row].isnan().any()))
        for kind in ("ternary", "binary"):
            q, scale, _ = ScaledQuantizer(kind=kind, per="row")(x)
            found.append(bool((q * scale)[row].isnan().all()))
        tally(all(found), f"{trial}: {found}")
