"""Byte-level BPE: trained on the user's text, or read from a tokenizer.json.

A trained tokenizer is exactly the "gpt-2" pre-tokenizer of llama.cpp: GPT-2's split, all 256 bytes in the alphabet,
no prefix space, no normalizer. Any UTF-8 text comes back unchanged, and each token stands for a known number of bytes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet.errors import UserError

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
SMALLEST_VOCAB = 257
"""All bytes and the end-of-text token."""
PIECE = 1 << 20
"""Longest string, in characters, that is handed to the tokenizer at once."""
GIANT = 5000
"""Characters without a space from which a word is cut when a tokenizer is trained."""


def pieces(document: str, size: int = PIECE) -> Iterator[str]:
    """Cut a long document after single newlines, where the byte-level split has a border anyway: same tokens."""
    start = 0
    for cut in re.finditer(r"(?<=\S)\n(?=\S)", document) if len(document) > size else ():
        if cut.end() - start >= size:
            yield document[start : cut.end()]
            start = cut.end()
    yield document[start:]


def _cut_giants(text: str) -> str:
    """Words that no language has, cut: training takes the square of a word's length, minutes for 100,000 letters."""
    return re.sub(rf"\S{{{GIANT}}}", lambda word: word[0] + "\n", text)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most ``vocab_size`` tokens, ``EOS`` being id 0; ``UserError`` if that is below 257."""
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"data.vocab_size = {vocab_size}: byte-level BPE needs at least {SMALLEST_VOCAB}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_cut_giants(p) for d in documents for p in pieces(d)), trainer)
    return tokenizer


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes; it neither cuts texts off nor fills them up, whatever is said
    there: transformers saves what it was last asked to do, and asks anew each time. Raises what ``from_str`` does.
    """
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json file, or the one in a folder."""
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer file.")
    try:
        return parse_tokenizer(file.read_text(encoding="utf-8"))
    except Exception as error:
        raise UserError(f"{file}: not a tokenizer.json ({str(error)[:100]}).") from error


def find_eos(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the end-of-text token: ``name``, or the first of the usual ones that the tokenizer knows."""
    for candidate in (name,) if name else KNOWN_EOS:
        if (token_id := tokenizer.token_to_id(candidate)) is not None:
            return int(token_id)
    wanted = name or " ".join(KNOWN_EOS)
    raise UserError(f"the tokenizer has no end-of-text token ({wanted}); name it with data.eos_token.")


def first_id(tokenizer: Tokenizer) -> int | None:
    """The id that this tokenizer puts before every text, if it does."""
    ids, plain = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    is_first = bool(plain) and ids[: len(plain)] == plain  # whatever is put behind it
    return None if is_first or not ids else int(ids[0])


def begin_id(tokenizer: Tokenizer, eos_id: int) -> int:
    """The id behind which a text stands: ``first_id``, or where there is none the end of another text."""
    begins = first_id(tokenizer)
    return eos_id if begins is None else begins


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of any length, without those that are put around it."""
    return [i for piece in pieces(text) for i in tokenizer.encode(piece, add_special_tokens=False).ids]


def template_tokens(tokenizer: Tokenizer, eos_id: int) -> dict[str, str]:
    """What a chat template may name: ``eos_token``, and ``bos_token``, which is empty where no text begins with one."""
    ids = {"eos_token": eos_id, "bos_token": first_id(tokenizer)}
    return {name: "" if i is None else tokenizer.id_to_token(i) or "" for name, i in ids.items()}


def begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Let the tokenizer put this token, which it knows, before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def token_byte_lengths(tokenizer: Tokenizer) -> list[int]:
    """For each id, the UTF-8 bytes of text that it stands for; 0 for special tokens.

    Exact for byte-level tokenizers, where one character of the vocabulary is one byte. For others it is the length of
    the decoded token, and ``TokenStore`` corrects the sum by the bytes that were really read.
    """
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    lengths = []
    for token_id in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(token_id)
        if token_id in special or token is None:
            lengths.append(0)
        elif is_byte_level(tokenizer):
            lengths.append(len(token))
        else:
            lengths.append(len(token.replace("\u2581", " ").encode()))
    return lengths
