"""AdamW in three groups: latent matrices, embeddings, and what is never decayed: norms, scales, adapters."""

from typing import Any

import torch
from torch import nn

from bitnet.config import OptimConfig, ScheduleConfig
from bitnet.training.schedules import lr_factor, weight_decay_factor


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by role: ``matrices``, ``embeddings`` (input and output), ``norms`` (and all that is small:
    biases, scales, zero points, adapters)."""
    tables = {
        id(p)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] == "lm_head"
        for p in module.parameters(recurse=False)
    }
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.endswith("weight")
            role = "embeddings" if id(parameter) in tables else "matrices" if is_matrix else "norms"
            groups[role].append(parameter)
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for role, parameters in parameter_groups(model).items():
        if parameters:
            decay = 0.0 if role == "norms" else config.weight_decay
            groups.append({"params": parameters, "role": role, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def apply_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, schedule: ScheduleConfig, step: int, total_steps: int
) -> None:
    """Set learning rate and weight decay of every group for optimizer step ``step``."""
    lr = config.lr * lr_factor(schedule, step, total_steps)
    weight_decay = config.weight_decay * weight_decay_factor(schedule, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = 0.0 if group["role"] == "norms" else weight_decay
