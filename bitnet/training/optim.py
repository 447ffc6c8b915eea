"""Optimizers over three groups: latent matrices, embeddings, and what is never decayed: norms, scales, adapters.

State in bytes per parameter: AdamW 8 (two float32 moments), 8-bit AdamW 2.03, Muon 4 (one momentum; its other
parameters are AdamW's), Adafactor next to nothing (a number per row and one per column). Weights and gradients take 4
each, whichever it is.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.config import OptimConfig, ScheduleConfig
from bitnet.errors import UserError
from bitnet.training.schedules import lr_factor, weight_decay_factor
from bitnet.training.spread_muon import can_be_dealt_out, spread_step


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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for the trainable parameters of ``model``. Raises ``UserError`` if it cannot be."""
    check_installed(config)
    roles = parameter_groups(model)
    groups: list[dict[str, Any]] = []
    for role, parameters in roles.items():
        if parameters:
            decay = 0.0 if role == "norms" else config.weight_decay
            groups.append({"params": parameters, "role": role, "kind": config.kind, "weight_decay": decay})
    return BUILDERS[config.kind](groups, config)


def check_installed(config: OptimConfig) -> None:
    """Refuse an optimizer whose package is missing."""
    if config.kind == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UserError("optim.kind = adamw8bit needs torchao, which is not installed: pip install torchao")


def check_shardable(config: OptimConfig) -> None:
    """Refuse an optimizer whose state cannot be spread over processes."""
    if config.kind in ("adafactor", "adamw8bit"):
        raise UserError(f"optim.kind = {config.kind} does not work with sharded weights; use adamw or muon.")


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _adafactor(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.lr)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for the matrices of the blocks and AdamW for everything else, as one optimizer.

    Muon moves a matrix by its orthogonalized momentum, scaled by 0.2 sqrt(max(N, K)), which makes its steps as large
    as AdamW's: it can take the same learning rate. Groups and state belong to this object; the two algorithms are lent
    them for a step, so that saving, loading and scheduling see an ordinary optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        matrices = [g for g in groups if g["role"] == "matrices"]
        others = [g for g in groups if g["role"] != "matrices"]
        if not matrices:
            raise UserError("optim.kind = muon: this recipe trains no matrices of the blocks; use adamw.")
        self._muon = torch.optim.Muon(matrices, lr=config.matrix_lr or config.lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = _adamw(others, config) if others else None
        self._is_dealt_out = can_be_dealt_out([p for group in matrices for p in group["params"]])
        super().__init__([*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else ())], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, is_muon in ((self._muon, True), (self._adamw, False)):
            if part is not None:
                # Loading a state dict replaces both, so they are handed over anew each time.
                part.param_groups = [g for g in self.param_groups if (g["role"] == "matrices") == is_muon]
                part.state = self.state
                if is_muon and self._is_dealt_out:
                    for group in part.param_groups:
                        spread_step(group, part.state)
                else:
                    part.step()
        return loss


CODED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments that 8-bit AdamW keeps as codes and one scale per block, and whether they have a sign."""


def _adamw8bit(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torchao's AdamW with block-wise 8-bit moments (arXiv 2110.02861).

    Its state dict holds the codes as plain tensors, since a checkpoint must be readable without torchao and with
    ``weights_only=True``.
    """
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    optimizer.register_state_dict_post_hook(_plain_state)
    optimizer.register_load_state_dict_pre_hook(_coded_state)
    return optimizer


def _plain_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    """A state dict of 8-bit AdamW with two tensors in the place of each coded moment."""
    states = {}
    for index, state in content["state"].items():
        states[index] = plain = dict(state)
        for key in CODED:
            if hasattr(plain.get(key), "codes"):  # small tensors are kept as they are
                moment = plain.pop(key)
                plain[f"{key}.codes"], plain[f"{key}.scale"] = moment.codes, moment.scale
    return {**content, "state": states}


def _coded_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    """The reverse of ``_plain_state``."""
    from torchao.optim.subclass_8bit import OptimState8bit

    states = {index: dict(state) for index, state in content["state"].items()}
    for state in states.values():
        for key, signed in CODED.items():
            if f"{key}.codes" in state:
                codes, scale = state.pop(f"{key}.codes"), state.pop(f"{key}.scale")
                block = codes.numel() // scale.numel()
                moment = OptimState8bit.zeros(codes.shape, signed, block, codes.device, torch.float32)
                moment.codes.copy_(codes)
                moment.scale.copy_(scale)
                state[key] = moment
    return {**content, "state": states}


BUILDERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": MuonAndAdamW,
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
}


def check_same_kind(saved: dict[str, Any], config: OptimConfig) -> None:
    """Refuse to go on with the state dict of another optimizer."""
    groups = saved.get("param_groups") or [{}]
    kind = groups[0].get("kind", "adamw")  # older checkpoints do not say
    if kind != config.kind:
        raise UserError(f"ckpt_path: that run used optim.kind = {kind}, not {config.kind}; its state does not fit.")


def apply_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, schedule: ScheduleConfig, step: int, total_steps: int
) -> None:
    """Set learning rate and weight decay of every group for optimizer step ``step``."""
    factor = lr_factor(schedule, step, total_steps)
    weight_decay = config.weight_decay * weight_decay_factor(schedule, step, total_steps)
    for group in optimizer.param_groups:
        peak = config.matrix_lr if config.matrix_lr and group["role"] == "matrices" else config.lr
        if isinstance(group["lr"], Tensor):  # 8-bit AdamW's step is compiled, and a tensor is no constant
            group["lr"].fill_(peak * factor)
        else:
            group["lr"] = peak * factor
        group["weight_decay"] = 0.0 if group["role"] == "norms" else weight_decay
