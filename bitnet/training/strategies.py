"""Strategies with less to choose than Lightning's, and what they have to do with low bits.

``ddp`` needs nothing here. FSDP2 and tensor parallelism go through ``torch.distributed``; what is done to the
model is in ``bitnet.training.parallel``.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from bitnet.errors import SaidByFirstProcess, UserError
from bitnet.sharded_checkpoint import what_failed, write_checksums
from bitnet.training.atomic import LAST, PREVIOUS, move_over


class FullySharded(ModelParallelStrategy):
    """FSDP2, and tensor parallelism where wanted: latent weights, gradients and optimizer state are spread.

    Args:
        tensor_parallel: Devices that share each matrix of a block; the rest is data parallel.
        gather: What a block's low-bit matrices are gathered as: packed levels (2 bits or 1), or their latent weights.
            Unless set, levels wherever the recipe computes with them from the first step on.
        sharded_checkpoints: Save a folder to which every process writes its part, in place of one ordinary file.
    """

    def __init__(
        self,
        tensor_parallel: int = 1,
        gather: Literal["levels", "latent"] | None = None,
        sharded_checkpoints: bool = False,
    ) -> None:
        if tensor_parallel < 1:
            raise UserError(f"trainer.strategy.tensor_parallel = {tensor_parallel}: must be 1 or more.")
        super().__init__(tensor_parallel_size=tensor_parallel, save_distributed_checkpoint=sharded_checkpoints)
        self.tensor_parallel, self.gather = tensor_parallel, gather

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        if processes % self.tensor_parallel:
            raise UserError(
                f"trainer.strategy.tensor_parallel = {self.tensor_parallel}: {processes} devices cannot be shared out "
                "in such groups."
            )
        self._data_parallel_size = processes // self.tensor_parallel
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder gets its name when every process has written its part, so that a stop leaves the old one.

        As with checkpoints that are files, the newest but one is kept as ``previous.ckpt``.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        final = Path(self.broadcast(filepath))
        partial = final.with_name(f"{final.name}.partial")
        if self.global_rank == 0 and partial.exists():
            shutil.rmtree(partial)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except CheckpointException as error:  # the same one in every process
            why = what_failed(error)
            left = "the one from before is intact" if final.exists() else "none has been saved yet"
            kind = UserError if self.global_rank == 0 else SaidByFirstProcess
            raise kind(f"{final}: it cannot be written ({why}); {left}.") from error
        self.barrier()
        write_checksums(partial, self.global_rank)
        self.barrier()
        if self.global_rank == 0:
            old = final.with_name(PREVIOUS if final.name == LAST else f"{final.name}.old")
            if final.exists():
                move_over(final, old)
            partial.rename(final)
            if final.name != LAST:
                shutil.rmtree(old, ignore_errors=True)
        self.barrier()


def data_parallel_size(trainer: L.Trainer) -> int:
    """How many different batches are worked on at once: all processes, or all groups of tensor parallelism."""
    return int((trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])
