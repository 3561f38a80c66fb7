"""The demo's corpora, from a made-up library, and its yardsticks, against their definitions."""

import ast
import json
import lzma
import math

import numpy as np
import pytest

from megagpt import demo
from megagpt.demo import Document, chosen, docstrings, without_docstrings, write_corpora, yardsticks

SOURCE = '''"""Module text."""
import os


class Box:
    """Class text,

        indented further.
    The end.
    """

    size = 1

    async def open(self):
        """Only a docstring."""

    def close(self): "on the line of its def"


if os.name:
    try:
        def late():
            """Found inside if and try."""
            return "not a docstring"
    finally:
        pass


def plain():
    return None
'''


def a_library(root, monkeypatch):
    texts = {
        "a.py": SOURCE, "copy.py": SOURCE, "package/b.py": 'def f():\n    """Another text."""\n    return 2\n',
        "package/__pycache__/d.py": '"""No cache."""\n', "package/notes.txt": "no source",
        "test/c.py": '"""No test."""\n',
    }  # fmt: skip
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(demo, "LEAST_PROSE", 10)


def documents_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_docstrings_are_found_in_classes_functions_and_nested_blocks_and_named_by_their_place():
    found = {document.path: document.text for document in docstrings(SOURCE, ast.parse(SOURCE), "a.py")}
    assert found == {
        "a.py": "Module text.\n",
        "a.py:Box": "Class text,\n\n    indented further.\nThe end.\n",
        "a.py:Box:open": "Only a docstring.\n",
        "a.py:late": "Found inside if and try.\n",
    }


def test_code_without_its_docstrings_is_still_code_and_keeps_its_other_strings():
    text = without_docstrings(SOURCE, ast.parse(SOURCE))
    ast.parse(text)
    for gone in ("Module text", "Class text", "indented further", "Only a docstring", "Found inside"):
        assert gone not in text
    assert text.startswith("import os")
    assert "async def open(self):\n        pass\n" in text
    assert 'return "not a docstring"' in text
    assert 'def close(self): "on the line of its def"' in text


def test_the_corpora_hold_the_library_s_own_text_once(tmp_path, monkeypatch):
    a_library(tmp_path / "library", monkeypatch)
    prose, code = write_corpora(tmp_path / "out")
    texts = [document["text"] for document in documents_of(prose)]
    assert len(texts) == len(set(texts)) == 4 + 1
    assert not {"No test.\n", "No cache.\n"} & set(texts)
    sources = documents_of(code)
    assert [document["path"] for document in sources] == ["copy.py", "package/b.py"]
    assert not any(text.strip() in document["text"] for text in texts for document in sources)


def test_the_corpora_are_the_same_every_time(tmp_path, monkeypatch):
    a_library(tmp_path / "library", monkeypatch)
    first = [path.read_bytes() for path in write_corpora(tmp_path / "first")]
    assert [path.read_bytes() for path in write_corpora(tmp_path / "second")] == first


def test_a_limit_keeps_some_of_the_documents_in_the_order_of_their_paths():
    documents = [Document(text=f"text {number:03}\n", path=f"{number:03}.py") for number in range(100)]
    kept = chosen(documents, 305)
    assert len(kept) == 33
    assert [one.path for one in kept] == sorted(one.path for one in kept)
    assert kept == chosen(reversed(documents), 305)
    assert kept[-1].path > "066.py"


def test_the_unigram_yardstick_is_the_entropy_of_add_one_counts():
    train, heldout = np.array([0, 0, 1], dtype=np.uint16), np.array([0, 1, 2], dtype=np.uint16)
    found = yardsticks(train, heldout, np.array([1, 2, 0]), b"abb")
    bits = -math.log2(3 / 6) - math.log2(2 / 6) - math.log2(1 / 6)
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / 3)


def test_the_bigram_yardstick_is_witten_bell_by_hand():
    """After 0 came 1, 1 and 2: two different successors. After 2 came nothing."""
    train = np.array([0, 1, 0, 1, 0, 2], dtype=np.uint16)
    unigram = {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}
    after_0 = {1: (2 + 2 * unigram[1]) / 5, 0: (0 + 2 * unigram[0]) / 5}
    expected = unigram[0] * after_0[1] * (2 + 1 * unigram[0]) / 3 * after_0[0]
    found = yardsticks(train, np.array([0, 1, 0, 0], dtype=np.uint16), np.ones(3, dtype=int), b"0100")
    assert found["bigram_bits_per_byte"] == pytest.approx(-math.log2(expected) / 4)
    unseen = yardsticks(train, np.array([2, 1], dtype=np.uint16), np.ones(3, dtype=int), b"21")
    assert unseen["bigram_bits_per_byte"] == pytest.approx(-math.log2(unigram[2] * unigram[1]) / 2)


def test_the_probabilities_after_each_token_sum_to_one():
    rng = np.random.default_rng(1)
    train, vocabulary = rng.integers(0, 20, 500), 23
    unigram = demo._unigram(train, vocabulary)
    assert unigram.sum() == pytest.approx(1)
    for before in range(vocabulary):
        total = sum(demo._bigram(train, np.array([before, after]), unigram)[1] for after in range(vocabulary))
        assert total == pytest.approx(1)


def test_ids_near_the_top_of_16_bits_do_not_overflow():
    train = np.array([65_000, 65_001] * 50, dtype=np.uint16)
    found = yardsticks(train, train[:10], np.ones(65_536, dtype=int), b"x" * 10)
    assert found["bigram_bits_per_byte"] < found["unigram_bits_per_byte"] < 16


def test_xz_is_the_size_of_the_compressed_text():
    text = b"the quick brown fox " * 50
    found = yardsticks(np.zeros(2, dtype=int), np.zeros(2, dtype=int), np.ones(2, dtype=int), text)
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)


@pytest.mark.parametrize("empty", range(3))
def test_nothing_to_measure_is_refused(empty):
    arguments = [np.zeros(2, dtype=int), np.zeros(2, dtype=int), b"ab"]
    arguments[empty] = arguments[empty][:0]
    train, heldout, text = arguments
    with pytest.raises(ValueError, match="yardsticks need"):
        yardsticks(train, heldout, np.ones(2, dtype=int), text)
