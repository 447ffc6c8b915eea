"""Strategies with one thing to choose less than Lightning's, and what a strategy means for counting."""

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes; a checkpoint is one ordinary file."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def data_parallel_size(trainer: L.Trainer) -> int:
    """How many processes see rows of their own.

    Processes that share one row (tensor parallelism) count once: whoever counts tokens multiplies by this and not by
    the number of processes.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return int(trainer.strategy.device_mesh["data_parallel"].size())
    return int(trainer.world_size)
