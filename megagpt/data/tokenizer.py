"""Tokenizers: load Hugging Face's `tokenizer.json`, or train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909;
over bytes as in GPT-2, Radford et al. 2019).

Text is always text: a special token spelled out inside a document is encoded as its characters, so that no document
can forge the end of another. The end-of-text token is appended here, once a document, and nothing else is added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megagpt.data.tables import canonical_json, sha256_of
from megagpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>")
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer. `definition` is the text of its tokenizer.json, `vocabulary` its largest id plus one.

    `added` are the spellings of its added tokens; `fast` encodes any other text to the same ids (gigatoken).
    """

    definition: str
    model: tokenizers.Tokenizer
    vocabulary: int
    end_of_text: int
    added: tuple[str, ...]
    fast: Callable[[str], np.ndarray] | None = None

    def sha256(self) -> str:
        """Hash of the definition's canonical JSON: layout and order of keys in the file do not matter."""
        return sha256_of(canonical_json(json.loads(self.definition)))

    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, with no end of text: a prompt."""
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> np.ndarray:
        """Ids of `text` with the end of text appended, on this thread alone.

        The library's call for many texts would spread them over threads, which fight with the other processes.
        """
        if self.fast is not None and not any(name in text for name in self.added):
            found = self.fast(text)
            document = np.empty(len(found) + 1, dtype=self.dtype())
            document[:-1], document[-1] = found, self.end_of_text
            return document
        ids = self.model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ids.append(self.end_of_text)
        return np.array(ids, dtype=self.dtype())

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids that were made elsewhere, with one end of text, at its end.

        Raises ValueError, worded to follow a document's name, if they are not this tokenizer's.
        """
        if len(ids) and ids[-1] == self.end_of_text:
            ids = ids[:-1]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ValueError(f"has ids from {ids.min():,} to {ids.max():,}; the tokenizer has {self.vocabulary:,}")
        if (ids == self.end_of_text).any():
            raise ValueError("has the end of text inside it")
        return np.append(ids, self.end_of_text).astype(self.dtype())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are written out."""
        return self.model.decode([int(token) for token in ids], skip_special_tokens=False)


def load_tokenizer(path: Path, end_of_text: str = "") -> Tokenizer:
    """Read `path`, a tokenizer.json or a folder that holds one (a corpus, a Hugging Face model).

    `end_of_text` names the token that ends a document; empty: the first that exists of the usual names.
    Raises UserError if there is no such file, it is not a tokenizer, or it has no such token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        definition = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no tokenizer at {file}.", "Give a tokenizer.json, or a folder with one.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the tokenizer {file} cannot be read: {error}.") from error
    return parse_tokenizer(definition, source=str(file), end_of_text=end_of_text)


def parse_tokenizer(definition: str, *, source: str, end_of_text: str = "") -> Tokenizer:
    """The tokenizer of a tokenizer.json's text; `source` names it in errors. Raises UserError as load_tokenizer."""
    try:
        model = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{source} is not a tokenizer.json of the tokenizers library: {error}.") from error
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    names = (end_of_text,) if end_of_text else _END_OF_TEXT_NAMES
    ids = [model.token_to_id(name) for name in names]
    found = [token for token in ids if token is not None]
    if not found:
        raise UserError(
            f"{source} has no end-of-text token: none of {', '.join(names)} is in its vocabulary.",
            "Name the token that ends a document with --end-of-text.",
        )
    vocabulary = max(model.get_vocab(with_added_tokens=True).values()) + 1
    added = tuple(token.content for token in model.get_added_tokens_decoder().values())
    return Tokenizer(definition=definition, model=model, vocabulary=vocabulary, end_of_text=found[0], added=added)


def with_gigatoken(tokenizer: Tokenizer, sample: Sequence[str]) -> Tokenizer:
    """The tokenizer with gigatoken (a Rust BPE, about 70 times faster) doing the work.

    Raises UserError if it is not installed, cannot read this tokenizer, or gives other ids for a text of `sample`.
    """
    try:
        import gigatoken
    except ImportError as error:
        remedy = "Install it with 'pip install megagpt[fast]', or build with --backend tokenizers."
        raise UserError("the tokenizer backend gigatoken is not installed.", remedy) from error
    remedy = "Build with --backend tokenizers, which is slower and always right."
    try:
        fast = replace(tokenizer, fast=gigatoken.Tokenizer.from_json(tokenizer.definition).encode)
        differing = next((text for text in sample if not _same_ids(tokenizer, fast, text)), None)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"gigatoken cannot encode with this tokenizer: {error}.", remedy) from error
    if differing is not None:
        raise UserError(f"gigatoken gives other ids than tokenizers for the text {differing[:60]!r}.", remedy)
    return fast


def _same_ids(tokenizer: Tokenizer, fast: Tokenizer, text: str) -> bool:
    return np.array_equal(tokenizer.encode_document(text), fast.encode_document(text))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocabulary` tokens: 256 bytes, `<|endoftext|>` (id 0) and merges.

    Few or uniform texts yield fewer tokens than asked for. Equal texts in equal order give an equal tokenizer.
    Raises UserError if `vocabulary` has no room for the bytes.
    """
    if vocabulary < _SMALLEST_VOCABULARY:
        raise UserError(f"vocabulary = {vocabulary} must be at least {_SMALLEST_VOCABULARY}: each byte is a token.")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return parse_tokenizer(model.to_str(pretty=True), source="the trained tokenizer", end_of_text=END_OF_TEXT)


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id stands for, int64 [vocabulary]; 0 for special tokens and unused ids.

    Bits per byte = loss in bits over the bytes of the targets. Raises UserError for tokenizers whose tokens do not
    spell bytes (neither byte-level nor SentencePiece-like).
    """
    definition = json.loads(tokenizer.definition)
    kinds = _kinds(definition.get("decoder"))
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback", "Replace"}:
        raise UserError(
            f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) does not say which bytes a token is.",
            "Bits per byte need a byte-level or SentencePiece-like tokenizer.",
        )
    lengths = np.zeros(tokenizer.vocabulary, dtype=np.int64)
    for token, identifier in tokenizer.model.get_vocab(with_added_tokens=False).items():
        lengths[identifier] = len(token) if "ByteLevel" in kinds else _sentencepiece_bytes(token)
    for added in definition.get("added_tokens", []):
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", [])))


def _sentencepiece_bytes(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("\u2581", " ").encode())
