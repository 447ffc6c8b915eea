"""Zero-shot figures that others have published, to stand beside ours: per cent correct, by lm-eval's names.

``acc`` throughout. Prompts and versions of tasks differ a little between sources: these are company, not a contest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

BITNET = "arXiv 2402.17764, table 2"
PYTHIA = "github.com/EleutherAI/pythia, evals/pythia-v1, step 143000"
HARNESS = "github.com/EleutherAI/lm-evaluation-harness, results/opt"


@dataclass(frozen=True)
class Published:
    """One model: parameters, and per cent correct by task."""

    name: str
    parameters: float
    source: str
    scores: dict[str, float]


def _bitnet(name: str, parameters: float, values: Sequence[float]) -> Published:
    tasks = ("arc_easy", "arc_challenge", "hellaswag", "boolq", "openbookqa", "piqa", "winogrande")
    return Published(name, parameters, BITNET, dict(zip(tasks, values, strict=True)))


MODELS = (
    Published("Pythia-70M", 70e6, PYTHIA, {"arc_easy": 37.4, "arc_challenge": 18.1, "lambada_openai": 18.5}),
    Published(
        "OPT-125M",
        125e6,
        HARNESS,
        {"arc_easy": 43.5, "arc_challenge": 18.9, "piqa": 63.0, "winogrande": 50.3, "lambada_openai": 37.9},
    ),
    Published(
        "OPT-350M",
        331e6,
        HARNESS,
        {"arc_easy": 44.0, "arc_challenge": 20.7, "piqa": 64.4, "winogrande": 52.3, "lambada_openai": 45.2},
    ),
    Published(
        "Pythia-410M",
        405e6,
        PYTHIA,
        {"arc_easy": 52.1, "arc_challenge": 21.3, "piqa": 66.8, "winogrande": 53.7, "lambada_openai": 51.6},
    ),
    _bitnet("LLaMA FP16 700M", 700e6, (54.7, 23.0, 37.0, 60.0, 20.2, 68.9, 54.8)),
    _bitnet("BitNet b1.58 700M", 700e6, (51.8, 21.4, 35.1, 58.2, 20.0, 68.1, 55.2)),
    _bitnet("LLaMA FP16 1.3B", 1.3e9, (56.9, 23.5, 38.5, 59.1, 21.6, 70.0, 53.9)),
    _bitnet("BitNet b1.58 1.3B", 1.3e9, (54.9, 24.2, 37.7, 56.7, 19.6, 68.8, 55.8)),
    _bitnet("LLaMA FP16 3B", 3e9, (62.1, 25.6, 43.3, 61.8, 24.6, 72.1, 58.2)),
    _bitnet("BitNet b1.58 3B", 3e9, (61.4, 28.3, 42.9, 61.5, 26.6, 71.5, 59.3)),
)


def of_the_same_size(parameters: int, tasks: Sequence[str]) -> list[Published]:
    """Models of half to twice as many parameters that have a score for at least one of ``tasks``."""
    return [m for m in MODELS if 0.5 <= m.parameters / parameters <= 2 and set(tasks) & set(m.scores)]
