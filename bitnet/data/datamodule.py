"""``TokenDataModule``: point it at text; it gives a Lightning trainer batches, and a run its tokenizer."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from tokenizers import Tokenizer

from bitnet.chat_template import PLAIN_TEMPLATE
from bitnet.data import streaming as stream
from bitnet.data.corpora import BUILTIN, DocumentList, Reading, open_corpus
from bitnet.data.loader import EvalLoader, TrainLoader, row_count
from bitnet.data.prepare import Progress, Splitting, prepare
from bitnet.data.tokenizer import EOS, find_eos, load_tokenizer
from bitnet.data.tokens import TokenStore, is_token_folder
from bitnet.errors import UserError
from bitnet_kernels.cpu.build import cache_root


class TokenDataModule(L.LightningDataModule):
    """Text in, batches of ``{"inputs", "targets"}`` (and ``"document_ids"``) out.

    Args:
        path: Files, folders, globs, hf:NAME, a prepared token folder, or builtin:python; a list mixes several.
        weights: Share of the training rows that each path supplies; null for all rows of all.
        val_path: Text to validate on; null holds out a part of path.
        val_fraction: Fraction of the text that is held out.
        val_split: Which documents are held out: drawn at random, or the last ones.
        separator: Text between two of these is one document; empty leaves files whole.
        text_key: Key of the text in .jsonl, .parquet and datasets.
        split: Split of a Hugging Face dataset.
        subset: Configuration name of a Hugging Face dataset.
        streaming: Read the text as it comes instead of preparing it on disk.
        stream_block: Batches that are gathered and shuffled together while streaming.
        stream_val_bytes: Bytes at the start of a stream that are held out when there is no val_path.
        chat_template: Learn the answers of conversations (.jsonl with messages): "plain", or a file with Jinja text.
        tokenizer: A tokenizer.json to use; null trains one on the text.
        vocab_size: Number of tokens of a tokenizer to be trained.
        eos_token: End-of-text token of a given tokenizer; null finds the usual ones.
        seq_len: Tokens per row.
        batch_size: Rows per device and step (times trainer.accumulate_grad_batches).
        val_batch_size: Rows per device while validating; null for batch_size.
        mask_documents: Let a token see only its own document.
        workers: Make batches in the background, tokenizing so many chunks of a stream at a time; 0 for within the step.
        seed: Decides held-out documents and the order of rows.
        cache_dir: Where prepared tokens are kept; null for $BITNET_CACHE or ~/.cache/bitnet-lightning.
    """

    def __init__(
        self,
        path: list[str] | str = BUILTIN,
        *,
        weights: list[float] | None = None,
        val_path: list[str] | str | None = None,
        val_fraction: float = 0.05,
        val_split: Literal["random", "last"] = "random",
        separator: str = "<|endoftext|>",
        text_key: str = "text",
        split: str = "train",
        subset: str | None = None,
        streaming: bool = False,
        stream_block: int = 64,
        stream_val_bytes: int = 1_000_000,
        chat_template: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 32_000,
        eos_token: str | None = None,
        seq_len: int = 2048,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        mask_documents: bool = False,
        workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.paths = [path] if isinstance(path, str) else list(path)
        self.val_paths = [val_path] if isinstance(val_path, str) else list(val_path or [])
        if not self.paths:
            raise UserError("data.path is empty: name at least one source.")
        _check_weights(weights)
        if not 0.0 < val_fraction < 1.0:
            raise UserError(f"data.val_fraction = {val_fraction}: must lie between 0 and 1.")
        counts = {"seq_len": seq_len, "batch_size": batch_size, "stream_block": stream_block}
        for name, value in {**counts, "val_batch_size": val_batch_size}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} = {value}: must be at least 1.")
        for name, value in {"workers": workers, "seed": seed}.items():
            if value < 0:
                raise UserError(f"data.{name} = {value}: must be 0 or more.")
        self.weights, self.vocab_size = weights, vocab_size
        self.reading = Reading(separator=separator, text_key=text_key, split=split, subset=subset)
        if chat_template is not None:
            self.reading = dataclasses.replace(self.reading, chat_template=_template(chat_template, streaming))
        self.splitting = Splitting(val_fraction=val_fraction, val_split=val_split, seed=seed)
        self.streaming, self.stream_block, self.stream_val_bytes = streaming, stream_block, stream_val_bytes
        self.tokenizer_path, self.eos_token = tokenizer, eos_token
        self.seq_len, self.batch_size, self.val_batch_size = seq_len, batch_size, val_batch_size or batch_size
        self.mask_documents, self.workers, self.seed = mask_documents, workers, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache_root()
        self.progress: Progress | None = None
        self.store: TokenStore | None = None
        self._stream_heads: list[int] = []
        self._loader: TrainLoader | stream.StreamLoader | None = None

    def _with_special_tokens(self) -> Reading:
        """``reading`` with the tokens that a chat template may name: not known before the tokenizer is. ``bos_token``
        is empty, since nothing is put before a document (``prepare``), nor before a text of the model that is trained.
        """
        if self.reading.chat_template is None:
            return self.reading
        eos = self.eos_token or EOS
        if self.tokenizer_path and not self.eos_token:
            given = load_tokenizer(self.tokenizer_path)
            eos = str(given.id_to_token(find_eos(given)))
        return dataclasses.replace(self.reading, special_tokens=(("eos_token", eos), ("bos_token", "")))

    # ---- preparing

    def prepare_tokens(self) -> TokenStore:
        """Read, tokenize and cache what is needed; idempotent. Raises ``UserError`` for bad or too little text."""
        if self.store is not None:
            return self.store
        if is_token_folder(self.paths[0]):
            store = self._prepared_folder()
        else:
            if self.eos_token is not None and self.tokenizer_path is None:
                raise UserError(
                    f"data.eos_token = {self.eos_token}: a tokenizer that is trained here ends texts with {EOS}; leave "
                    "it out, or give data.tokenizer."
                )
            self.reading = self._with_special_tokens()
            self._check_weights(len(self.paths))
            val = [open_corpus(p, self.reading) for p in self.val_paths]
            train = self._stream_corpora(val) if self.streaming else [open_corpus(p, self.reading) for p in self.paths]
            store = prepare(
                train,
                val,
                self.reading,
                self.splitting,
                self.tokenizer_path,
                self.vocab_size,
                self.eos_token,
                self.cache_dir,
                self.progress,
            )
        self._check_length(store)
        self.store = store
        return store

    def _prepared_folder(self) -> TokenStore:
        path = self.paths[0]
        if len(self.paths) > 1 or self.streaming:
            raise UserError(f"{path}: a prepared token folder must be the only data.path, and not streamed.")
        decided = {"val_path": self.val_paths, "chat_template": self.reading.chat_template}
        for name in (name for name, value in decided.items() if value):
            raise UserError(f"data.{name}: {path} is a prepared token folder, which has this decided; leave it out.")
        store = TokenStore(Path(path).expanduser())
        self._check_weights(store.sources)
        self.reading = dataclasses.replace(self.reading, chat_template=store.chat_template)
        return store

    def _check_weights(self, sources: int) -> None:
        if self.weights is not None and len(self.weights) != sources:
            raise UserError(f"data.weights has {len(self.weights)} numbers for {sources} paths.")

    def _stream_corpora(self, val: list[Any]) -> list[Any]:
        """Hold the head of the stream out into ``val`` unless there is some; return a sample for the tokenizer."""
        weights = self.weights or [1.0] * len(self.paths)
        head: list[str] = []
        sample: list[str] = []
        self._stream_heads = []
        # Of each source by itself: behind the mixing, one that begins again would bring what is held out.
        for path, source, weight in zip(
            self.paths, stream.open_streams(self.paths, self.reading), weights, strict=True
        ):
            share = weight / sum(weights)
            val_bytes, sample_bytes = (0 if val else round(share * self.stream_val_bytes)), round(share * (16 << 20))
            held, seen, records = stream.take_head(source, path, self.reading.text_key, val_bytes, sample_bytes)
            head, sample, self._stream_heads = head + held, sample + seen, [*self._stream_heads, records]
        name = ", ".join(self.paths)
        if not val:
            val.append(DocumentList(f"{name} (first {len(head)} documents)", head))
        return [DocumentList(f"{name} (sample)", sample)]

    def _check_length(self, store: TokenStore) -> None:
        tokens = sum(store.totals(f"train-{i}").tokens for i in range(store.sources))
        rows = sum(row_count(store.totals(f"train-{i}").tokens, self.seq_len) for i in range(store.sources))
        if not self.streaming and rows < self.batch_size:
            raise UserError(
                f"{', '.join(self.paths)}: {tokens} training tokens make {rows} rows of data.seq_len = {self.seq_len}; "
                f"a batch needs {self.batch_size}. Give more text, or lower data.seq_len or data.batch_size."
            )
        if self.weights is not None and not self.streaming:
            for i, path in enumerate(store.meta["paths"]):
                if self.weights[i] > 0 and row_count(store.totals(f"train-{i}").tokens, self.seq_len) == 0:
                    raise UserError(f"{path}: too short for one row of data.seq_len = {self.seq_len}.")

    def prepare_data(self) -> None:
        self.prepare_tokens()

    def setup(self, stage: str) -> None:
        self.prepare_tokens()

    @property
    def tokens(self) -> TokenStore:
        assert self.store is not None, "prepare_tokens() has not been called"
        return self.store

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokens.tokenizer

    # ---- loaders

    def _rows_of_this_process(self, store: TokenStore) -> dict[str, Any]:
        trainer = self.trainer
        shares = trainer.distributed_sampler_kwargs if trainer else None
        ranks = {"rank": shares["rank"], "world_size": shares["num_replicas"]} if shares else {}
        return {**ranks, "separator": store.separator if self.mask_documents else None}

    def train_dataloader(self) -> "TrainLoader | stream.StreamLoader":
        store = self.tokens
        self._close_loader()
        self._loader = self._stream_loader(store) if self.streaming else self._row_loader(store)
        return self._loader

    def _row_loader(self, store: TokenStore) -> TrainLoader:
        files = [store.ids(f"train-{i}") for i in range(store.sources)]
        loader = TrainLoader(
            files,
            self.seq_len,
            self.batch_size,
            weights=self.weights,
            seed=self.seed,
            workers=self.workers,
            **self._rows_of_this_process(store),
        )
        if len(loader) == 0:
            raise UserError(
                f"{loader.rows_per_epoch} rows do not fill one batch of {loader.rows_per_batch} "
                f"(data.batch_size x {loader.world_size} devices)."
            )
        return loader

    def _stream_loader(self, store: TokenStore) -> stream.StreamLoader:
        trainer = self.trainer
        if trainer is None or trainer.max_steps is None or trainer.max_steps < 0:
            raise UserError("data.streaming: a stream has no epochs; set trainer.max_steps.")
        sources = zip(stream.open_streams(self.paths, self.reading), self._stream_heads, strict=True)
        return stream.StreamLoader(
            stream.interleave([s.skip(head) if head else s for s, head in sources], self.weights, self.seed),
            store.tokenizer,
            store.eos_id,
            self.seq_len,
            self.batch_size,
            text_key=self.reading.text_key,
            block_batches=self.stream_block,
            length=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=self.seed,
            workers=self.workers,
            **self._rows_of_this_process(store),
        )

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.feed.close()

    def teardown(self, stage: str) -> None:
        self._close_loader()

    def on_exception(self, exception: BaseException) -> None:
        self._close_loader()

    def val_dataloader(self) -> EvalLoader:
        store = self.tokens
        return EvalLoader(store.ids("val"), self.seq_len, self.val_batch_size, **self._rows_of_this_process(store))

    # ---- what a run keeps of its data

    def summary(self) -> dict[str, Any]:
        """Plain values that identify the text: paths, sizes, sha256, Python version."""
        meta = self.tokens.meta
        return {
            # As they are called in this run: the cache knows the same text perhaps by another name.
            "paths": self.paths,
            "val_paths": self.val_paths,
            **{key: meta[key] for key in ("train", "val", "vocab_size", "eos_id", "python")},
            "sha256": meta["settings"]["sources"],
            "folder": str(self.tokens.folder),
        }

    def chat_extras(self) -> dict[str, str]:
        """What a model that was taught to answer has to remember; empty for one that was not."""
        template = self.reading.chat_template
        return {"chat_template": template} if template else {}


def _template(name: str, streaming: bool) -> str:
    """Jinja text of ``data.chat_template``."""
    if streaming:
        raise UserError("data.chat_template: conversations are prepared, not streamed; leave out data.streaming.")
    file = Path(name).expanduser()
    if name != "plain" and not file.is_file():
        raise UserError(f"data.chat_template = {name}: neither 'plain' nor a file.")
    try:
        return PLAIN_TEMPLATE if name == "plain" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template = {name}: cannot be read as UTF-8 text.") from error


def _check_weights(weights: list[float] | None) -> None:
    if weights is None:
        return
    if not all(0.0 <= weight < math.inf for weight in weights):
        raise UserError(f"data.weights = {weights}: each must be a number of 0 or more.")
    if sum(weights) <= 0:
        raise UserError(f"data.weights = {weights}: one must be positive.")
