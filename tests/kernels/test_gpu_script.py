"""The logic of the GPU script, on tiny sizes and with a timer that runs each thing once: nothing here is measured."""

import json
import math

import pytest
import torch

from benchmarks import kernels_gpu
from benchmarks.kernels_gpu import Shape
from tests.kernels.helpers import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="where there is a GPU, the script itself runs")
SHAPES = (
    Shape(T=32, K=16), Shape(T=32, K=16, window=8), Shape(T=32, K=16, document=16),
    Shape(T=32, K=16, causal=False), Shape(T=16, K=16, causal=False, keys=32),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=Shape.name)
def test_visible_pairs_are_counted_exactly(shape):
    query, key = torch.arange(shape.T)[:, None], torch.arange(shape.keys or shape.T)
    seen = (key <= query) | (not shape.causal)
    if shape.window:
        seen &= query - key < shape.window
    if shape.document:
        seen &= query // shape.document == key // shape.document
    assert shape.pairs() == seen.expand(shape.T, len(key)).sum()


def test_every_shape_and_system_is_measured_and_a_peer_that_fails_is_listed(monkeypatch, tmp_path, capsys):
    def once(run, **_):
        run()
        return 1.0

    monkeypatch.setattr(kernels_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(kernels_gpu, "SHAPES", SHAPES)
    monkeypatch.setattr(kernels_gpu, "BATCH_TOKENS", 32)
    monkeypatch.setattr(kernels_gpu, "WIDTH", 16)
    monkeypatch.setattr(kernels_gpu, "NORM_WIDTHS", (16,))
    monkeypatch.setattr(kernels_gpu, "copy_rate", lambda: 1.0)
    monkeypatch.setattr(kernels_gpu, "largest_error", lambda: {"attention": 1.0})
    monkeypatch.setattr(kernels_gpu, "repeats", lambda _: {"attention": True})
    monkeypatch.setattr(kernels_gpu.triton.testing, "do_bench", once)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr("sys.argv", ["kernels_gpu.py", "--out", str(tmp_path / "found.json")])
    assert kernels_gpu.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    ours = [result for result in found if result["system"] == "megagpt"]
    attended = ["attention"] * len(SHAPES)
    assert [result["what"] for result in ours] == ["layernorm", "residual + layernorm", "cross entropy", *attended]
    assert all(not result["error"] and math.isclose(result["forward_ms"], 1) for result in ours)
    assert any(result["system"] == "torch, cuDNN" and result["error"] for result in found)
    assert "cross entropy" in capsys.readouterr().out
