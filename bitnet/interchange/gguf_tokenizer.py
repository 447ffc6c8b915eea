"""Byte-level BPE tokenizers between tokenizer.json and GGUF's metadata.

llama.cpp knows a tokenizer by the name of how it splits text before its merges. ``SPLITS`` is that table, in the terms
of the tokenizers library; it serves export and import.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from bitnet.data.tokenizer import begin_with, first_id, is_byte_level
from bitnet.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of llama.cpp."""

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _by_regex(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS: dict[str, Any] = {
    "gpt-2": GPT_2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    "llama-bpe": _by_regex(LLAMA_3),
    "qwen2": _by_regex(QWEN_2),
}
WHOLE_WORDS = ("llama-bpe",)
"""Splits after which a piece that is a token is taken whole, without merges."""
BEGUN = ("llama-bpe",)
"""Splits whose texts begin with the ``bos_token`` unless the file says that they do not."""


def _plain(step: dict[str, Any]) -> Any:
    """A step of a pre-tokenizer without what does not change its result (``trim_offsets``)."""
    inner = step.get("pretokenizers")
    if inner is not None:
        return [_plain(part) for part in inner] if len(inner) > 1 else _plain(inner[0])
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name of the split of a tokenizer.json. Raises ``UserError`` when it has none here."""
    if content.get("normalizer"):
        raise UserError("the tokenizer normalizes text first; llama.cpp's byte-level BPE does not.")
    mine = _plain(content["pre_tokenizer"] or {})
    for name, split in SPLITS.items():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        if _plain(json.loads(tokenizer.to_str())["pre_tokenizer"]) == mine:
            return name
    raise UserError(f"the tokenizer splits text in a way that has no name here (known: {', '.join(SPLITS)}).")


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, eos_id: int, chat_template: str | None) -> None:
    """Write the tokenizer into a ``gguf.GGUFWriter``, filled up to ``vocab_size``. Raises ``UserError``."""
    if not is_byte_level(tokenizer):
        raise UserError("GGUF export knows byte-level BPE tokenizers only; this one is of another kind.")
    content = json.loads(tokenizer.to_str())
    special = {t["id"] for t in content["added_tokens"] if t["special"]}
    added = {t["id"] for t in content["added_tokens"]} - special
    tokens = [tokenizer.id_to_token(i) for i in range(vocab_size)]

    def kind(i: int, token: str | None) -> int:
        return UNUSED if token is None else CONTROL if i in special else USER_DEFINED if i in added else NORMAL

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(content))
    writer.add_token_list([f"[UNUSED_{i}]" if token is None else token for i, token in enumerate(tokens)])
    writer.add_token_types([kind(i, token) for i, token in enumerate(tokens)])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    begins = first_id(tokenizer)
    writer.add_bos_token_id(eos_id if begins is None else begins)
    writer.add_eos_token_id(eos_id)
    writer.add_pad_token_id(eos_id)
    writer.add_add_bos_token(begins is not None)
    if chat_template:
        writer.add_chat_template(chat_template)


def read_tokenizer(fields: dict[str, Any], file: object) -> tuple[Tokenizer, str | None]:
    """``(tokenizer, eos token)`` from GGUF metadata, keys without ``tokenizer.ggml.``. Raises ``UserError``."""
    if fields.get("model") != "gpt2":
        raise UserError(
            f"{file}: tokenizer of kind {fields.get('model')!r}; only byte-level BPE ('gpt2') is read. "
            "Import the Hugging Face folder of the model instead."
        )
    split = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}.get(
        fields.get("pre", ""), fields.get("pre")
    )
    if split not in SPLITS:
        raise UserError(f"{file}: text is split as {split!r}; known: {', '.join(SPLITS)}.")
    tokens, types = fields["tokens"], fields.get("token_type") or [NORMAL] * len(fields["tokens"])
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split in WHOLE_WORDS))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file}: its merges do not fit its tokens ({error}).") from error
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=True) if k == kind]
        )
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
    if fields.get("add_bos_token", split in BEGUN) and bos is not None:
        begin_with(tokenizer, tokens[bos])
    return tokenizer, None if eos is None else tokens[eos]
