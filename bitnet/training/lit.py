"""``LitBitNet``: a transformer, a recipe, an optimizer and a schedule as one Lightning module."""

import dataclasses
import time
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from bitnet import checkpoint
from bitnet.config import ModelConfig, OptimConfig, ScheduleConfig
from bitnet.data.calibration import spaced_batches
from bitnet.data.datamodule import TokenDataModule
from bitnet.data.loader import row_count
from bitnet.errors import UserError
from bitnet.layers import Arithmetic, low_bit_layers
from bitnet.layers.levels_together import hold_levels, release_levels
from bitnet.layers.normed_rows import fuse_norms
from bitnet.loss import Score, score_batch
from bitnet.model import Transformer
from bitnet.recipes import BitNet, Distilled, PostTraining, Progress, Recipe, no_progress
from bitnet.training.optim import apply_schedule, build_optimizer, check_installed, check_same_kind, check_shardable
from bitnet.training.precision import LatentFloat32
from bitnet_kernels.training_reference import MAX_INT8_K

DEFAULT_OPTIM = OptimConfig()
DEFAULT_SCHEDULE = ScheduleConfig()
DEFAULT_ARITHMETIC = Arithmetic()
NOT_PLAIN = "scale, scale_per, learned_scale and mask_beyond"
"""Options of ``BitNet`` whose layers are not the fast ones."""


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of those with a NaN or an infinity in what this process holds of them."""
    pieces = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in tensors.items()}
    return [name for name, piece in pieces.items() if not piece.isfinite().all()]


class LitBitNet(L.LightningModule):
    """Pre-trains a low-bit transformer.

    Args:
        config: Sizes and switches of the transformer.
        recipe: How it takes on low-bit weights.
        optim: The optimizer's settings.
        schedule: Learning rate and weight decay over the run.
        init_from: Run folder or checkpoint whose weights to start from; null for random weights.
        calibration_rows: Rows of the training text that a recipe may look at before training begins.
        arithmetic: On which units low-bit layers multiply while training.
        compile: Compile each block with torch.compile.
        matmul_precision: Precision of float32 matmuls (torch.set_float32_matmul_precision).
        loss_chunk: Tokens whose logits exist at once; null for all. Recipes that compare logits always hold all.
        activation_checkpointing: Compute the inside of each block again in backward instead of keeping it.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        optim: OptimConfig = DEFAULT_OPTIM,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        calibration_rows: int = 128,
        arithmetic: Arithmetic = DEFAULT_ARITHMETIC,
        compile: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        loss_chunk: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if loss_chunk is not None and loss_chunk < 1:
            raise UserError(f"loss_chunk = {loss_chunk}: must be 1 or more, or null.")
        check_installed(optim)
        self.loss_chunk, self.activation_checkpointing = loss_chunk, activation_checkpointing
        self.config = config
        self.recipe, self.optim, self.schedule = recipe, optim, schedule
        self.init_from, self.compile_blocks, self.matmul_precision = init_from, compile, matmul_precision
        self.calibration_rows, self.arithmetic = calibration_rows, arithmetic
        self.calibration_progress: Progress = no_progress
        self.preparation: dict[str, float] = {}
        """What the recipe has cost before the first step."""
        self.record: dict[str, dict[str, Any]] = {}
        """What the run is trained with (``bitnet.training.changes``)."""
        self.resumes = False
        """Whether a checkpoint of this run will fill the model: then nothing is calibrated again."""
        self.model: Transformer | None = None
        self.grad_norm = torch.tensor(torch.nan)
        """Norm of the gradient of the last optimizer step, all parameters together, before clipping."""
        self.steps_now = True
        """Whether the batch in hand ends a window of gradient accumulation. Inside of one, ``last.ckpt`` is not saved:
        its batches would count as done, and their gradients be lost. True before the first batch."""
        self._ends = False
        """Whether somebody, such as ``trainer.max_time``, asked the run to end: it does behind the next step."""
        self.broken_gradients: list[str] = []
        """Parameters whose gradient was not finite in a step that was therefore not taken."""
        self._validation = Score()
        self._refreshed_at = -1

    # ---- building

    @property
    def data(self) -> TokenDataModule:
        datamodule: TokenDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule

    @property
    def transformer(self) -> Transformer:
        assert self.model is not None, "configure_model() has not been called"
        return self.model

    @property
    def total_steps(self) -> int:
        return max(1, int(self.trainer.estimated_stepping_batches))

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_shardable(self.optim)
        torch.set_float32_matmul_precision(self.matmul_precision)
        vocab_size = self.data.tokens.vocab_size
        if vocab_size != self.config.vocab_size:
            self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        self.check_sizes(self.data)

    def check_sizes(self, data: TokenDataModule) -> None:
        """Refuse rows longer than the model's context, more tokens than integer sums hold, and a layer that is none."""
        if self.config.max_seq_len < data.seq_len:
            raise UserError(
                f"data.seq_len = {data.seq_len} is longer than model.config.max_seq_len = {self.config.max_seq_len}."
            )
        tokens = data.batch_size * data.seq_len
        if self.arithmetic.weight_gradient != "float" and tokens > MAX_INT8_K:
            raise UserError(
                f"data.batch_size x data.seq_len = {tokens}: model.arithmetic.weight_gradient = "
                f"{self.arithmetic.weight_gradient} adds up {MAX_INT8_K} tokens at most; lower data.batch_size, and "
                "raise trainer.accumulate_grad_batches."
            )
        if isinstance(self.recipe, Distilled) and not -(n := self.config.n_layers) <= self.recipe.relation_layer < n:
            raise UserError(f"relation_layer = {self.recipe.relation_layer}: the model has the layers 0 to {n - 1}.")

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.check_recipe()
        self.check_strategy(self.trainer.strategy)
        model = Transformer(self.config)
        if self.init_from:
            self._load_initial(model, self.init_from)
        started = time.monotonic()
        batches = self._calibration()
        model.eval()  # what a recipe looks at is not thinned out by dropout
        self.recipe.prepare(model, batches, self.calibration_progress)
        model.train()
        self.preparation = {
            "seconds": round(time.monotonic() - started, 1),
            "calibration_tokens": sum(batch.numel() for batch in batches),
            "block_tokens": getattr(self.recipe, "found", {}).get("block_tokens", 0),
        }
        model.loss_chunk, model.recomputes_blocks = self.loss_chunk, self.activation_checkpointing
        for layer in low_bit_layers(model).values():
            layer.arithmetic = self.arithmetic
        fuse_norms(model.layers)
        if self.is_spread:
            from bitnet.training.parallel import shard_model  # slow to import, and seldom needed

            assert self.device_mesh is not None
            shard_model(model, self.device_mesh)
        if self.compile_blocks:
            for block in model.layers:
                block.compile()
        self.model = model

    def _load_initial(self, model: Transformer, path: str) -> None:
        """Weights of another run; float and low-bit runs have the same keys."""
        content = checkpoint.read_checkpoint(path)
        self._check_fits(content["bitnet"], f"model.init_from = {path}")
        self.check_is_float(content["bitnet"], path)
        checkpoint.load_state(model, checkpoint.without_factors(content), f"model.init_from = {path}")

    def check_recipe(self) -> None:
        """Refuse a recipe with nothing to start from, nothing to train or no such gradients, before any work begins."""
        name = type(self.recipe).__name__
        if not self.recipe.trains:
            raise UserError(f"model.recipe = {name}: there is nothing to train; use 'bitnet quantize'.")
        if self.recipe.needs_parent and not self.init_from:
            raise UserError(f"model.recipe = {name} starts from a trained float model: set model.init_from to its run.")
        gradients = {self.arithmetic.input_gradient, self.arithmetic.weight_gradient}
        if isinstance(self.recipe, BitNet) and not self.recipe.has_plain_scale and gradients != {"float"}:
            raise UserError(f"model.arithmetic: {NOT_PLAIN} of the recipe need float gradients.")

    def check_strategy(self, strategy: Any) -> None:
        """Refuse what cannot be computed over several processes as in one, before any work begins."""
        if not isinstance(strategy, ModelParallelStrategy):
            return
        if isinstance(strategy.precision_plugin, LatentFloat32):
            raise UserError(
                "overlays/bf16_true: sharded weights are of one dtype; use overlays/bf16 with overlays/fsdp."
            )
        if isinstance(self.recipe, PostTraining):
            name = type(self.recipe).__name__
            if getattr(strategy, "tensor_parallel", 1) > 1:
                raise UserError(f"model.recipe = {name}: tensor parallelism is for recipes that train from scratch.")
            if self.recipe.state() == "frozen":
                raise UserError(f"model.recipe = {name}: its integers cannot be sharded; use overlays/ddp.")
        recipe = self.recipe if isinstance(self.recipe, BitNet) else BitNet()
        if not recipe.has_plain_scale and recipe.scale_per == "matrix":
            raise UserError(
                f"model.recipe: {NOT_PLAIN} with sharded weights need scale_per = row, or a group of inputs."
            )
        if getattr(strategy, "tensor_parallel", 1) > 1:
            if self.loss_chunk is not None:
                raise UserError("model.loss_chunk: tensor parallelism cuts the output head another way; leave it out.")
            if recipe.act4_from is not None and any(recipe.bits_of(name, 4) == 4 for name in ("wo", "w2")):
                raise UserError(
                    f"model.recipe.keep_8bit = {list(recipe.keep_8bit)}: tensor parallelism needs wo and w2 in it."
                )
        if self.recipe.begins_in_float and getattr(strategy, "gather", None) == "levels":
            raise UserError(
                "trainer.strategy.gather = levels: quantize_from and quantizer_warmup compute with latent weights at "
                "first. Set both to 0, or leave gather out."
            )

    def check_is_float(self, description: dict[str, Any], path: str) -> None:
        """Refuse a low-bit parent where the recipe needs a float one; ``path`` is for the message."""
        if self.recipe.needs_parent and not checkpoint.is_float(description):
            raise UserError(
                f"model.init_from = {path}: a low-bit model ({description['recipe']['name']}); "
                f"{type(self.recipe).__name__} starts from a float one (weight: none, act_bits: none)."
            )

    def _calibration(self) -> list[Tensor]:
        if self.resumes or not self.recipe.needs_text or not self.calibration_rows:
            return []
        data = self.data
        store = data.tokens
        counts = [store.totals(f"train-{i}").tokens for i in range(store.sources)]
        rows_of_each = [row_count(count, data.seq_len) for count in counts]
        shares = [1.0] if data.streaming else data.weights or rows_of_each  # a stream has one sample of all
        ends = np.rint(np.cumsum(shares) / sum(shares) * self.calibration_rows).astype(int)
        rows = np.diff(ends, prepend=0).tolist()
        found = [spaced_batches(store.ids(f"train-{i}"), n, data.seq_len, n)[0] for i, n in enumerate(rows) if n]
        return list(torch.cat(found).split(data.batch_size))

    def _check_fits(self, description: dict[str, Any], where: str) -> None:
        checkpoint.check_fits(description, self.config, self.data.tokenizer.to_str(), where)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.transformer, self.optim)

    # ---- training

    def on_train_start(self) -> None:
        self._ends = False

    def _apply_stage(self) -> None:
        """Not before training or validation begins: to ask for ``total_steps`` makes the loaders, and Lightning gives a
        loader its place in the data when it makes it, which is in the checkpoint."""
        self.recipe.on_step(self.transformer, self.global_step, self.total_steps)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.steps_now = False
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        apply_schedule(optimizer, self.optim, self.schedule, self.global_step, self.total_steps)
        self._apply_stage()
        if self.is_spread:
            self._refresh_spread()
        elif not self.compile_blocks and (self.trainer.accumulate_grad_batches > 1 or self.device.type == "cuda"):
            # Compiled layers keep nothing; on a GPU all weights are quantized at once.
            hold_levels(low_bit_layers(self.transformer).values())

    @property
    def is_spread(self) -> bool:
        """Whether this process holds only a part of each matrix."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _refresh_spread(self) -> None:
        """The scales of whole matrices, once for the weights of this step."""
        from bitnet.training.parallel import refresh

        if self._refreshed_at != self.global_step:
            gather = getattr(self.trainer.strategy, "gather", "latent")
            refresh(self.transformer, gather or ("latent" if self.recipe.begins_in_float else "levels"))
            self._refreshed_at = self.global_step

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps_now = True
        release_levels(low_bit_layers(self.transformer).values())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's, which refuses fused optimizers under bf16 although nothing is scaled there.

        Clipping finds the norm anyway, so whoever wants to know it reads it here; it stays on the device.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded weights
        if self.device.type == "cpu" and not self.grad_norm.isfinite():  # on a GPU, asking would wait for it
            self._drop_gradients()
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def _drop_gradients(self) -> None:
        """A weight without a gradient is not updated; ``Watch`` ends the run behind this step."""
        gradients = {name: p.grad for name, p in self.transformer.named_parameters() if p.grad is not None}
        self.broken_gradients = not_finite(gradients)
        self.zero_grad()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.recipe.loss(self.transformer, batch)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._ends |= self.trainer.should_stop
        self.trainer.should_stop = self._ends and self.steps_now
        if self.global_step >= self.total_steps:
            self.trainer.should_stop = True  # the run ends here anyway; this makes Lightning validate once more

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self._apply_stage()
        if self.is_spread:
            self._refresh_spread()
        self._validation = Score()
        self._byte_lengths = self.data.tokens.byte_lengths().to(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._validation += score_batch(self.transformer, batch, self._byte_lengths)

    def on_validation_epoch_end(self) -> None:
        score = self._validation
        if self.trainer.world_size > 1:
            totals = torch.tensor([score.nats, score.tokens, score.text_bytes], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(totals)
            nats, tokens, text_bytes = totals.tolist()
            score = Score(nats, int(tokens), text_bytes)
        metrics = {"val/loss": score.loss, "val/bpb": score.bits_per_byte}
        self.log_dict(metrics, logger=False, sync_dist=self.trainer.world_size > 1)  # for checkpoints and progress
        if self.trainer.logger is not None and not self.trainer.sanity_checking:
            self.trainer.logger.log_metrics(metrics, step=self.global_step)

    # ---- checkpoints

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        served = self.recipe.served(self.global_step, self.total_steps)
        content["bitnet"] = checkpoint.describe(
            self.config, served, self.data.tokenizer.to_str(), self.data.chat_extras()
        )
        content["bitnet"]["data"] = self.data.summary()
        content["bitnet"]["record"] = self.record
        content["bitnet"]["inside_window"] = not self.steps_now

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        if "bitnet" not in content:
            raise UserError("ckpt_path: not a checkpoint of this library (it has no 'bitnet' entry).")
        self._check_fits(content["bitnet"], "ckpt_path")
        for saved in content.get("optimizer_states", []):
            check_same_kind(saved, self.optim)
