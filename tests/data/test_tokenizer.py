from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from megagpt.data.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer, token_byte_lengths, train_tokenizer
from megagpt.errors import UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café"] * 20
TRAINED = train_tokenizer(TEXTS, 300)


def word_level(words: list[str]) -> str:
    vocabulary = {word: number for number, word in enumerate(words)}
    return tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).to_str()


@given(st.text())
def test_a_trained_tokenizer_gives_any_text_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(st.text())
def test_byte_lengths_of_the_tokens_of_a_text_add_up_to_its_bytes(text: str) -> None:
    ids = TRAINED.encode_document(text)
    assert token_byte_lengths(TRAINED)[ids].sum() == len(text.encode())


def test_equal_texts_train_an_equal_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 300).definition == TRAINED.definition
    assert TRAINED.vocabulary == max(TRAINED.model.get_vocab().values()) + 1 <= 300
    assert train_tokenizer(TEXTS[:2], 300).sha256() != TRAINED.sha256()


def test_a_document_ends_with_the_end_of_text_and_cannot_forge_one() -> None:
    ids = TRAINED.encode_document("a<|endoftext|>b").tolist()
    assert ids[-1] == TRAINED.end_of_text
    assert TRAINED.end_of_text not in ids[:-1]
    assert TRAINED.decode(ids[:-1]) == "a<|endoftext|>b"


def test_padding_and_truncation_in_the_file_do_not_touch_documents() -> None:
    model = tokenizers.Tokenizer.from_str(TRAINED.definition)
    model.enable_truncation(3)
    model.enable_padding(length=8)
    tokenizer = parse_tokenizer(model.to_str(), source="test")
    assert tokenizer.encode_document("the cat sat on the mat").tolist() == TRAINED.encode_document(TEXTS[0]).tolist()


def test_the_hash_ignores_how_the_file_is_laid_out() -> None:
    turned = json.dumps(dict(reversed(json.loads(TRAINED.definition).items())))
    assert parse_tokenizer(turned, source="test").sha256() == TRAINED.sha256()


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<|endoftext|>"])
def test_the_usual_names_of_the_end_of_text_are_found(name: str) -> None:
    assert parse_tokenizer(word_level(["a", "b", name]), source="test").end_of_text == 2


def test_the_end_of_text_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level(["a", "STOP", "</s>"]), encoding="utf-8")
    assert load_tokenizer(tmp_path, "STOP").end_of_text == 1
    assert load_tokenizer(tmp_path / "tokenizer.json").end_of_text == 2


def test_ids_take_two_bytes_where_they_fit_and_four_where_not() -> None:
    def dtype(count: int) -> str:
        words = ["</s>", *(f"w{number}" for number in range(count - 1))]
        return parse_tokenizer(word_level(words), source="test").dtype().name

    assert (dtype(65_536), dtype(65_537)) == ("uint16", "uint32")


def test_byte_lengths_of_a_sentencepiece_like_tokenizer() -> None:
    words = ["</s>", "<0x0A>", "\u2581the", "\u2581", "é"]
    model = tokenizers.Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True)
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    model.add_special_tokens(["</s>"])
    assert token_byte_lengths(parse_tokenizer(model.to_str(), source="test")).tolist() == [0, 1, 4, 1, 2]


def bad(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    return path


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(bad(tmp_path, b"{}"))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(bad(tmp_path, b"\xff"))


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    with pytest.raises(UserError, match="has no end-of-text token: none of "):
        parse_tokenizer(word_level(["a"]), source="test")
    with pytest.raises(UserError, match="none of STOP is in its vocabulary"):
        parse_tokenizer(word_level(["a", "</s>"]), source="test", end_of_text="STOP")


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary = 256 must be at least 257"):
        train_tokenizer([], 256)


def test_byte_lengths_of_words_are_refused() -> None:
    tokenizer: Tokenizer = parse_tokenizer(word_level(["a", "</s>"]), source="test")
    with pytest.raises(UserError, match=r"decoder \(none\) does not say"):
        token_byte_lengths(tokenizer)
