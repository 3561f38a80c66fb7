"""The fast tokenizer backend gives the same ids, or is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.build import build
from megagpt.data.task import Recipe
from megagpt.data.tokenizer import Tokenizer, train_tokenizer, with_gigatoken
from megagpt.errors import UserError
from tests.data.test_build import contents, texts

pytest.importorskip("gigatoken")
HARD = [
    "",
    " ",
    "a<|endoftext|>b",
    "naïve 東京 🙂\u200d\u0000",
    "\r\n\t  x",
    "aaaa" * 900,
    "it's 1,234.5—ok",
    "\ufeffx",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*texts(1, 30), *HARD], 400)


@pytest.mark.parametrize("end_of_text", [0, 9])
def test_every_text_has_the_same_ids(tokenizer: Tokenizer, end_of_text: int) -> None:
    tokenizer = replace(tokenizer, end_of_text=end_of_text)
    fast = with_gigatoken(tokenizer, HARD)
    for text in [*HARD, *texts(2, 50)]:
        assert fast.encode_document(text).tolist() == tokenizer.encode_document(text).tolist()
        assert fast.encode_document(text).dtype == tokenizer.dtype()


def test_a_corpus_is_the_same_bytes_with_either_backend(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"text": text}) for text in [*texts(3, 80), *HARD]))
    for fast in (False, True):
        build(
            [str(raw)],
            tmp_path / str(fast),
            tokenizer=None,
            recipe=Recipe(heldout=0.1, tasks=4, vocabulary=400),
            processes=2,
            fast=fast,
        )
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_other_ids_or_a_tokenizer_that_it_cannot_read_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train_tokenizer(["zzz qqq"], 300)
    mixed = replace(tokenizer, definition=other.definition)
    with pytest.raises(UserError, match="gigatoken gives other ids than tokenizers for the text 'alpha"):
        with_gigatoken(mixed, ["alpha beta gamma"])
    with pytest.raises(UserError, match="gigatoken cannot encode with this tokenizer"):
        with_gigatoken(replace(tokenizer, definition=json.dumps({"model": {"type": "WordLevel", "vocab": {}}})), [])
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match="the tokenizer backend gigatoken is not installed"):
        with_gigatoken(tokenizer, [])


def test_a_text_that_spells_a_special_token_is_never_given_to_the_fast_encoder(tokenizer: Tokenizer) -> None:
    wrong = replace(tokenizer, fast=lambda text: np.array(tokenizer.encode(text)[1:], dtype=np.uint32))
    assert wrong.encode_document("alpha beta").tolist() != tokenizer.encode_document("alpha beta").tolist()
    assert wrong.encode_document("a<|endoftext|>").tolist() == tokenizer.encode_document("a<|endoftext|>").tolist()


def test_a_build_whose_input_shows_other_ids_is_refused_before_a_shard_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"text": text}) for text in [*texts(3, 80), *HARD]))
    encode = Tokenizer.encode_document

    def wrong(tokenizer: Tokenizer, text: str) -> np.ndarray:
        return encode(tokenizer, text + "x" if tokenizer.fast and "東京" in text else text)

    monkeypatch.setattr(Tokenizer, "encode_document", wrong)
    recipe = Recipe(heldout=0.1, tasks=4, vocabulary=400)
    with pytest.raises(UserError, match="gigatoken gives other ids than tokenizers for the text 'naïve"):
        build([str(raw)], tmp_path / "out", tokenizer=None, recipe=recipe, processes=1, fast=True)
    assert not list((tmp_path / "out").glob("*.tar"))
