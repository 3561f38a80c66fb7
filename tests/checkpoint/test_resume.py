"""Checkpoints of real engines: what is saved under any ZeRO stage loads, bit for bit, under any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from megagpt.checkpoint import lineage
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import folder_at
from megagpt.checkpoint.lineage import Commit
from megagpt.checkpoint.load import check_model, load, newest_valid, read_manifest, weights
from megagpt.checkpoint.save import KINDS, save
from megagpt.errors import UserError
from megagpt.mesh import mesh_of
from megagpt.model import build
from megagpt.parallel import ranks
from tests.parallel.test_engine import MODEL, OPTIM, ROWS, part, rows, run_of
from tests.ranks import on_ranks

FP32 = [{"zero_stage": stage} for stage in range(4)]
CASES = [
    *FP32,
    *[{"zero_stage": stage, "precision": "bf16"} for stage in (0, 1, 3)],
    {"zero_stage": 2, "precision": "fp16"},
]


def name_of(case: dict[str, Any]) -> str:
    return f"{case['zero_stage']}-{case.get('precision', 'fp32')}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/A: two steps on layout A; FOLDER/A-B: A loaded on layout B and saved again. All on two ranks."""
    root = tmp_path_factory.mktemp("saved")

    def work() -> Any:
        from megagpt.parallel.engine import Engine

        ranks.join(world=2)
        mesh = mesh_of(run_of(zero_stage=0, data=2, micro_batch=4).parallel, ranks.rank())

        def steps(engine: Engine, numbers: range) -> list[float]:
            half = ROWS // 2
            batches = [part(rows(step), half * mesh.rank, half * (mesh.rank + 1)) for step in numbers]
            return [engine.train_batch([batch], lr=OPTIM.lr).loss for batch in batches]

        def commit(engine: Engine, folder: Path) -> None:
            save(folder_at(folder), engine.owned(), header={"counters": engine.counters()}, rank=mesh.rank, ranks=2)

        losses = {}
        for case in CASES:
            run = run_of(data=2, micro_batch=4, **case)
            engine = Engine(run, mesh)
            steps(engine, range(2))
            commit(engine, root / name_of(case))
            uninterrupted = steps(engine, range(2, 4))
            resumed = {}
            for other in [*FP32, *([case] if case not in FP32 else [])]:
                engine = Engine(run_of(data=2, micro_batch=4, **other), mesh)
                manifest = read_manifest(Commit(1, 2, folder_at(root / name_of(case))))
                check_model(manifest, engine.shapes())
                load(manifest, engine.held())
                engine.restored(manifest.header["counters"])
                commit(engine, root / f"{name_of(case)}-{name_of(other)}")
                if case == other:
                    resumed = steps(engine, range(2, 4))
            losses[name_of(case)] = [uninterrupted, resumed]
        return losses

    (root / "losses.json").write_text(json.dumps(on_ranks(work, 2, root)[0]))
    return root


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by kind and name, put together by hand."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for item in manifest["files"]:
        with safetensors.safe_open(folder / item["file"], framework="pt") as reader:
            for box in item["boxes"]:
                for kind in KINDS:
                    whole = found.setdefault(f"{kind}/{box['tensor']}", torch.full(box["shape"], torch.nan))
                    place = Box(tuple(box["start"]), tuple(box["size"])).slices()
                    assert whole[place].isnan().all(), "an element is stored twice"
                    whole[place] = reader.get_tensor(box["keys"][kind])
    return found


@pytest.mark.parametrize("source", [name_of(case) for case in CASES])
def test_a_checkpoint_loads_bit_for_bit_on_every_other_layout(saved, source):
    expected = contents(saved / source)
    assert expected
    for target in {*map(name_of, FP32), source}:
        found = contents(saved / f"{source}-{target}")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), f"{name} on {target}"


@pytest.mark.parametrize("case", [name_of(case) for case in CASES])
def test_losses_after_a_resume_on_the_same_layout_are_bitwise_equal(saved, case):
    uninterrupted, resumed = json.loads((saved / "losses.json").read_text())[case]
    assert uninterrupted == resumed


def test_no_rank_writes_more_than_its_share(saved):
    for case in CASES:
        files = list((saved / name_of(case)).glob("*.safetensors"))
        sizes = sorted(path.stat().st_size for path in files)
        assert len(sizes) == 2
        assert sizes[1] <= 1.15 * sizes[0], f"{name_of(case)}: {sizes}"


def test_weights_come_out_whole(saved):
    found = dict(weights(read_manifest(Commit(1, 2, folder_at(saved / "3-fp32")))))
    expected = contents(saved / "3-fp32")
    assert len(found) == len(list(build(MODEL).named_parameters()))
    for name, value in found.items():
        assert torch.equal(value, expected[f"weight/{name}"])


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A run's checkpoints folder with two commits."""
    generation = lineage.begin(folder_at(tmp_path), None)
    for step, name in ((1, "1-fp32"), (2, "2-fp32")):
        shutil.copytree(saved / name, str(lineage.commit_folder(folder_at(tmp_path), generation, step)))
    return tmp_path


def step_folder(root: Path) -> Path:
    return Path(str(lineage.commit_folder(folder_at(root), 1, 2)))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(root, damage):
    folder = step_folder(root)
    victim = folder / ("manifest.json" if damage == "manifest" else "rank-00001.safetensors")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1 << 6
    replaced = {"flip": bytes(content), "truncate": bytes(content[:-1]), "empty": b"", "manifest": b"{}"}
    victim.unlink()
    if damage in replaced:
        victim.write_bytes(replaced[damage])
    manifest, faults = newest_valid(folder_at(root))
    assert manifest is not None
    assert manifest.commit.step == 1
    assert len(faults) == 1
    assert victim.name in faults[0]


def test_if_no_checkpoint_is_usable_the_run_is_refused_instead_of_begun_anew(root):
    for path in root.rglob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint under .* is usable"):
        newest_valid(folder_at(root))


def test_a_newer_format_is_refused_with_both_versions(root):
    path = step_folder(root) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(UserError, match="format version 99, and this megagpt reads version 2"):
        read_manifest(Commit(1, 2, folder_at(path.parent)))


def test_another_model_is_refused_by_the_first_tensor_that_differs(root):
    manifest = read_manifest(Commit(1, 2, folder_at(step_folder(root))))
    shapes = {**manifest.shapes, "embedding.position.weight": (17, 32)}
    with pytest.raises(UserError, match=r"embedding.position.weight is \[16, 32\] there and \[17, 32\] in this run"):
        check_model(manifest, shapes)
    with pytest.raises(UserError, match="it has no blocks.9.attention.output.weight"):
        check_model(manifest, {**manifest.shapes, "blocks.9.attention.output.weight": (1, 1)})
    del shapes["embedding.position.weight"]
    with pytest.raises(UserError, match="this run has no embedding.position.weight"):
        check_model(manifest, shapes)


def test_a_save_that_cannot_be_written_says_so_and_is_no_checkpoint(saved, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    parts = [dataclasses.replace(item, weight=item.weight.clone()) for item in _slices(saved)]
    folder = tmp_path / "step"
    monkeypatch.setattr("os.write", full)
    with pytest.raises(UserError, match="was not written: .*No space left on device"):
        save(folder_at(folder), parts, header={}, rank=0, ranks=1)
    assert list(folder.iterdir()) == []


def _slices(saved: Path) -> list[Any]:
    from megagpt.checkpoint.boxes import Box
    from megagpt.parallel.state import Slice

    value = torch.zeros(2, 3)
    return [Slice("a", (2, 3), Box((0, 0), (2, 3)), value, value.clone(), value.clone())]
