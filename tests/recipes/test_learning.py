"""What tells a working method from a stub, on a trained model; bounds held for three seeds (benchmarks/results).

The experiments are those of benchmarks/post_training.py; one seed runs here.
"""

import pytest

from benchmarks import post_training as toy
from bitnet.model import Transformer

Figures = dict[str, float]

pytestmark = pytest.mark.slow  # the parent alone trains for minutes


def test_rounding(parent: Transformer) -> None:
    found = toy.rounding(parent, 0)
    assert found["rtn8"] < 1.001 * found["float"] < found["rtn4"] < found["rtn3"] < found["rtn2"]
    assert found["rtn2"] > 1.2 * found["float"] and found["ternary_absmean"] > 3 * found["float"]
    for bits in (3, 2):
        assert found[f"gptq{bits}"] < found[f"rtn{bits}"]
        assert found[f"spqr{bits}"] < found[f"gptq{bits}"]
    assert found["awq2"] < 1.1 * found["rtn2"]  # nothing here has outliers: it must do no harm
    assert found["zeroquant4"] < found["zeroquant4_0"]


def test_smoothing(parent: Transformer) -> None:
    found = toy.smoothing(parent, 0)
    exact = found["float"]
    assert found["float_outliers"] == pytest.approx(exact, rel=1e-5)  # the outliers change nothing in floating point
    assert found["o2_none"] > 2 * exact and found["o3_none"] > 2 * exact
    assert found["o2_0.5"] < 1.02 * exact and found["o3_0.5"] < 1.02 * exact and found["o1_0.5"] < 1.02 * exact
    assert found["llm_int8"] < 1.02 * exact < found["rtn_w8a8"]


def test_training_the_linears_alone(parent: Transformer) -> None:
    found = toy.qat(parent, 0)
    assert found["minmax_recovered"] > 0.6 and found["learned_recovered"] > 0.6
    assert found["w4a4"] < 0.9 * found["w4a4_rtn"]
    assert found["ternary_continued"] < 0.4 * found["ternary_rounded"]


def test_blocks_then_scales(parent: Transformer) -> None:
    found = toy.blocks(parent, 0)
    assert max(found[f"block{i}_ratio"] for i in range(3)) < 0.7
    assert found["efficient_qat"] < found["block_ap"] < found["rtn"]
    assert found["efficient_qat"] < found["peqa"] < found["rtn"]


def test_text_of_its_own(parent: Transformer) -> None:
    found = toy.llm_qat(parent, 0)
    hybrid = found["hybrid_soft"]
    assert hybrid >= 0.75 and hybrid >= 0.93 * found["real_soft"]
    assert hybrid - found["greedy_soft"] >= 0.10 and hybrid - found["random_soft"] >= 0.20
    assert hybrid > found["hybrid_hard"]


def test_adapters(parent: Transformer) -> None:
    found = toy.adapters(parent, 0)
    for name in ("nf2", "unif2"):
        for stage in ("_init", ""):
            zero, one, five = (found[f"{name}_{start}{stage}"] for start in ("zero", "loftq1", "loftq5"))
            assert zero > one > five
    assert found["unif2_zero_init"] < found["nf2_zero_init"]  # equal steps are better at two bits
    assert found["qa_lora"] < found["qa_lora_init"]
    assert found["qa_lora_merged"] == pytest.approx(found["qa_lora"], rel=1e-5)
