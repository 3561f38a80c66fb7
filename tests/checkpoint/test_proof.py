"""The checksum that proves a load: the same for every layout, and another one if a number is in the wrong place."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint import boxes, lineage, proof
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import folder_at, sealed, unsealed
from megagpt.checkpoint.load import newest_valid
from megagpt.config import Checkpoint, Parallel
from megagpt.parallel import place
from tests.test_train import MODEL, TRAIN, fit, losses, records, run_of


def by_definition(value: torch.Tensor) -> int:
    """The formula of the module's docstring, with Python's numbers."""

    def weight(dim: int, index: int) -> int:
        mixed = ((2**48 * dim + index) * 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) % 2**64
        return mixed ^ mixed >> 31 | 1

    matrix = value.view(torch.int32).reshape(len(value), -1).tolist()
    return (
        sum(bits * weight(0, i) * weight(1, j) for i, row in enumerate(matrix) for j, bits in enumerate(row)) % 2**64
    )


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (40, 9000)])
def test_the_parts_of_any_cut_add_up_to_what_the_definition_says(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = proof.of_box(value, shape, Box((0,) * len(shape), shape))
    if value.numel() < 1000:
        assert whole == by_definition(value)
    rng = random.Random(2)
    cuts = sorted(rng.sample(range(1, value.numel()), 4))
    parts = [
        proof.of_box(value[box.slices()], shape, box)
        for start, stop in zip([0, *cuts], [*cuts, value.numel()], strict=True)
        for box in boxes.of_range(shape, start, stop - start)
    ]
    assert sum(parts) % 2**64 == whole


@pytest.mark.parametrize("shape", [(1, 70000), (70000, 1), (300, 200), (3, 40000)])
def test_a_gpu_adds_up_the_same(shape):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    rows, columns = (torch.randint(-(2**62), 2**62, (size,), generator=generator) for size in shape)
    expected = proof._sum_on_device(bits, rows, columns)
    assert proof._sum_in_one_pass(bits.numpy(), rows.numpy(), columns.numpy()) == expected


def test_any_two_numbers_that_change_places_and_any_bit_that_flips_change_it():
    value = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    whole = Box((0, 0), (6, 5))
    true = proof.of_box(value, (6, 5), whole)
    for one in range(30):
        for other in range(one):
            swapped = value.flatten().clone()
            swapped[[one, other]] = swapped[[other, one]]
            assert proof.of_box(swapped.view(6, 5), (6, 5), whole) != true
        for bit in range(32):
            flipped = value.flatten().clone()
            flipped.view(torch.int32)[one] ^= 1 << bit if bit < 31 else -(2**31)
            assert proof.of_box(flipped.view(6, 5), (6, 5), whole) != true


def shifted() -> None:
    """A planted mistake: of a parameter cut in parts, the first two are taken for each other where they are alike."""
    pieces = place.Placed._pieces

    def wrong(self: place.Placed) -> Any:
        found = list(pieces(self))
        if len(found) > 1 and found[0][0].size == found[1][0].size:
            (a, to_a, owned), (b, to_b, _), *rest = found
            found = [(a, to_b, owned), (b, to_a, owned), *rest]
        return iter(found)

    place.Placed._pieces = wrong  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def begun(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in two tensor ranks, saved."""
    out = tmp_path_factory.mktemp("proof") / "run"
    assert fit(three(corpora), out) == 0
    return out


def three(corpora: dict[str, Path], steps: int = 3) -> Any:
    train = dataclasses.replace(TRAIN, steps=steps, eval_every=0)
    model = dataclasses.replace(MODEL, kv_heads=1)  # both ranks hold it, and one answers for it
    return run_of(corpora, model=model, parallel=Parallel(tensor=2), train=train, checkpoint=Checkpoint(every=0))


def test_a_load_is_proven_equal_to_the_manifest_and_says_so(corpora, begun, tmp_path, capfd):
    shutil.copytree(begun, tmp_path / "run")
    assert fit(three(corpora, 4), tmp_path / "run") == 0
    assert "0 defaulted; proven equal" in capfd.readouterr().out


def test_a_mistake_in_where_tensors_belong_is_found_though_it_agrees_with_itself(corpora, begun, tmp_path, capfd):
    shutil.copytree(begun, tmp_path / "run")
    assert fit(three(corpora, 4), tmp_path / "run", before=shifted) == 1
    said = capfd.readouterr().err
    assert "is not what the ranks hold now: weight of blocks.0.attention.query_key_value.weight has the" in said
    assert records(tmp_path / "run", "events")[-1]["event"] == "corruption"


def test_a_manifest_without_checksums_is_loaded_and_told_to_be_unproven(corpora, begun, tmp_path, capfd):
    shutil.copytree(begun, tmp_path / "run")
    root = folder_at(tmp_path / "run" / "checkpoints")
    folder = next(lineage.commits(root)).folder
    content = unsealed(folder.read(lineage.MANIFEST))
    del content["checksums"], content["xxh3_128"]
    folder.write(lineage.MANIFEST, [sealed(content)])
    assert newest_valid(root)[0] is not None
    assert fit(three(corpora, 4), tmp_path / "run") == 0
    assert "0 defaulted; not proven: no checksums" in capfd.readouterr().out
    assert len(losses(tmp_path / "run")) == 4
