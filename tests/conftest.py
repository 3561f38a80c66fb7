"""What tests share: one thread, so that ranks can be forked from pytest, and a small corpus."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # must be chosen before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = "the a one model token loss learns reads writes small large fast exact layer head norm step rank batch".split()


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny corpora of one tokenizer (512 tokens), each with held-out documents."""
    from megagpt.data.build import Recipe, build

    folder = tmp_path_factory.mktemp("corpora")
    found: dict[str, Path] = {}
    for number, name in enumerate(("prose", "code")):
        raw = folder / f"{name}.jsonl"
        raw.write_text("".join(json.dumps({"text": _text(number, item)}) + "\n" for item in range(150)))
        tokenizer = found.get("prose")
        recipe = Recipe(heldout=0.1, tasks=2, vocabulary=512)
        build([str(raw)], folder / name, tokenizer=tokenizer, recipe=recipe, processes=1)
        found[name] = folder / name
    return found


def _text(corpus: int, document: int) -> str:
    """Sentences by a small linear congruence: the same on every machine, and not quite random."""
    state, words = 7919 * (document + 1) + corpus, []
    for _ in range(30 + 13 * document % 90):
        state = (1103515245 * state + 12345) % 2**31
        words.append(WORDS[(state >> 16) % len(WORDS)] + ("()" if corpus and state % 5 == 0 else ""))
    return " ".join(words) + "."
