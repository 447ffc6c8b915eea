"""What training over several devices costs, on paper: bytes that travel, memory, and tokens per second at best.

Ring collectives (arXiv 1909.08053, 2004.13336): with n devices a gather or a scatter of b bytes moves b (n - 1) / n
through each device, an all-reduce twice that. Per micro-batch of FSDP2 every weight of a block is gathered twice and
every gradient scattered once; with tensor parallelism every block adds up activations four times. Once a step, Muon
sends the pieces of each matrix to its owner, and back, in two bytes a number. A step takes the longer of computing and
sending, if they overlap fully. Computing is taken at a share of the matrix units' peak that a good program reaches;
sending at the full speed of the links.
"""

from dataclasses import dataclass
from typing import Literal

from bitnet.config import ModelConfig
from bitnet.estimate import TrainingMemory, count_parameters, flops_per_token

StrategyName = Literal["ddp", "fsdp", "tp"]
BLOCKS_AT_ONCE = 2
"""Blocks whose whole weights are there together under FSDP2: the one in use and the next."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks of data sheets, dense, in operations and bytes per second."""

    name: str
    bf16: float
    int8: float
    near: float
    """To devices of the same machine, one direction."""
    wide: float
    """To other machines: one device's share of the network."""
    memory: float
    per_machine: int = 8


GPUS = {
    "h100": Gpu(name="H100 SXM", bf16=989e12, int8=1979e12, near=450e9, wide=50e9, memory=80e9),
    "a100": Gpu(name="A100 SXM", bf16=312e12, int8=624e12, near=300e9, wide=25e9, memory=80e9),
    "rtx4090": Gpu(name="RTX 4090", bf16=165e12, int8=661e12, near=25e9, wide=12.5e9, memory=24e9),
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Per device and optimizer step, unless said otherwise."""

    devices: int
    gathered: float
    """Bytes of weights that arrive."""
    reduced: float
    """Bytes of gradients that leave (all-reduce: arrive and leave)."""
    activations_sent: float
    optimizer_sent: float
    """Of updates to the owners of matrices and back (Muon)."""
    scales: float
    memory: float
    compute_s: float
    communication_s: float
    tokens: int
    """Of all devices."""

    @property
    def sent(self) -> float:
        return self.gathered + self.reduced + self.activations_sent + self.optimizer_sent + self.scales

    @property
    def tokens_per_s(self) -> float:
        """Of all devices, if communication hides behind computing as far as it fits."""
        return self.tokens / max(self.compute_s, self.communication_s)


def gathered_bits(weight: str, gather: str) -> float:
    """Bits of one low-bit weight as it travels."""
    return {"ternary": 2.0, "binary": 1.0}.get(weight, 32.0) if gather == "levels" else 32.0


def estimate(
    config: ModelConfig,
    memory: TrainingMemory,
    *,
    weight: str,
    rows: int,
    seq_len: int,
    micro_batches: int,
    devices: int,
    strategy: StrategyName,
    gather: str = "levels",
    optimizer: str = "adamw",
    gradient_bytes: int = 4,
    gpu: Gpu = GPUS["h100"],
    utilisation: float = 0.45,
    int8: bool = False,
    recomputes: bool = False,
) -> Estimate:
    """``rows`` x ``seq_len`` tokens a device and micro-batch; ``memory`` is that of one device alone.

    ``recomputes`` is for activation checkpointing: the blocks' forward once more in backward.
    """
    counts = count_parameters(config)
    other = counts.total - counts.linear
    share = (devices - 1) / devices
    tokens = rows * seq_len
    scales = 2 * share * 7 * config.n_layers * 4 * 8
    gathered = reduced = sent = optimizer_sent = 0.0
    block = counts.linear / config.n_layers
    if strategy == "ddp":
        reduced = 2 * share * 4 * counts.total
        need = memory.total + 4.0 * counts.total  # DDP's buckets are copies of the gradients
        scales = 0.0
    elif strategy == "fsdp":
        # Blocks are gathered again for backward; embedding, head and last norm stay after the forward.
        weights = 2 * counts.linear * gathered_bits(weight, gather) / 8 + 2 * 4 * counts.norms + 4 * counts.embeddings
        gathered = share * weights * micro_batches
        reduced = share * gradient_bytes * counts.total * micro_batches
        spread = (memory.weights + memory.gradients + memory.optimizer) / devices
        whole = BLOCKS_AT_ONCE * block * (4 + gathered_bits(weight, gather) / 8) + block * 4 + other * 8
        need = spread + whole + memory.activations
    else:
        # Two sums of outputs forward, two of gradients backward, float32; embedding and head once each way.
        sums = (6 if recomputes else 4) * config.n_layers + 2
        sent = 2 * share * 4 * tokens * config.dim * sums * micro_batches
        need = (memory.weights + memory.gradients + memory.optimizer + memory.quantized + memory.activations) / devices
    if optimizer == "muon" and strategy != "ddp":
        optimizer_sent = share * 2 * 2 * counts.linear / devices
    flops, low_bit = flops_per_token(config, seq_len), 6 * counts.linear if int8 else 0
    if recomputes:
        flops += flops_per_token(config, seq_len, training=False) - 2 * config.vocab_size * config.dim
        low_bit = low_bit * 4 // 3
    per_token = low_bit / gpu.int8 + (flops - low_bit) / gpu.bf16
    compute = micro_batches * tokens * per_token / utilisation / (devices if strategy == "tp" else 1)
    link = gpu.near if devices <= gpu.per_machine else gpu.wide
    total = gathered + reduced + sent + optimizer_sent + scales
    return Estimate(
        devices=devices, gathered=gathered, reduced=reduced, activations_sent=sent, optimizer_sent=optimizer_sent,
        scales=scales, memory=need, compute_s=compute, communication_s=total / link,
        tokens=tokens * micro_batches * (1 if strategy == "tp" else devices),
    )  # fmt: skip
