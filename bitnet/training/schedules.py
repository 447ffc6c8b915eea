"""Learning rate and weight decay as pure functions of the step: nothing to save, nothing to restore.

With p = step / total, w = warmup / total and peak 1 (``OptimConfig.lr`` multiplies it)::

    warm-up     (step + 1) / warmup                                  while step < warmup
    linear      1 - q                                                q = (p - w) / (1 - w)
    two_stage   (1 - q) * (1 while p < stage2_at, else stage2_ratio) Microsoft's training tips, 2024
    cosine      (1 + cos(pi q)) / 2
    wsd         1 while p < 1 - d, else (1 - p) / d                  d = decay_fraction
    constant    1

The result is never below ``min_ratio`` after the warm-up. Weight decay is 1 until ``weight_decay_until``, then 0
(BitNet at 1/2, TriLM at 2/3): it lowers the confidence of latent weights, which late in training only flips signs.
"""

import math

from bitnet.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for optimizer step ``step`` (from 0) of ``total_steps``."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = min(step / total_steps, 1.0)
    warmup = min(schedule.warmup_steps / total_steps, 1.0)
    after_warmup = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    match schedule.kind:
        case "linear":
            factor = 1.0 - after_warmup
        case "two_stage":
            peak = 1.0 if progress < schedule.stage2_at else schedule.stage2_ratio
            factor = peak * (1.0 - after_warmup)
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * after_warmup))
        case "wsd":
            left = 1.0 - progress
            factor = 1.0 if left > schedule.decay_fraction else left / schedule.decay_fraction
        case "constant":
            factor = 1.0
    return max(factor, schedule.min_ratio)


def weight_decay_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the weight decay for optimizer step ``step`` of ``total_steps``: 1 or 0."""
    return 1.0 if step < schedule.weight_decay_until * total_steps or schedule.weight_decay_until == 1.0 else 0.0
