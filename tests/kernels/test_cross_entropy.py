"""Cross entropy and the fused head against fp64, whole and cut over ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from megagpt.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from megagpt.kernels.head_loss import head_loss
from tests.kernels.helpers import DEVICE, DTYPES, assert_as_exact_as_torch, assert_repeats, random, with_gradients

EXTRAS = [{}, {"smoothing": 0.1, "z_loss": 1e-2}]


def targets(R, V):
    y = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y[::5] = -100
    return y


@pytest.mark.usefixtures("careful")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize(("V", "vocabulary"), [(1, 1), (131, 131), (4160, 4099)])
def test_losses_and_gradients_are_as_exact_as_torchs(dtype, extra, V, vocabulary):
    logits, y = random(7, V, dtype=dtype, seed=1) * 3, targets(7, vocabulary)
    _, dlogits = assert_as_exact_as_torch(
        lambda x: cross_entropy(x, y, vocabulary=vocabulary, **extra),
        lambda x: cross_entropy_reference(x, y, vocabulary=vocabulary, **extra),
        [logits],
    )
    assert not dlogits[:, vocabulary:].any()
    assert not dlogits[y < 0].any()


@pytest.mark.usefixtures("careful")
def test_padded_columns_have_no_probability_however_large_they_are():
    logits, y = random(3, 48, dtype=torch.float32, seed=1), targets(3, 40)
    high = logits.clone()
    high[:, 40:] = 1e4
    assert torch.equal(cross_entropy(high, y, vocabulary=40), cross_entropy(logits, y, vocabulary=40))


@pytest.mark.usefixtures("careful")
def test_logits_of_any_size_and_minus_infinity_give_finite_losses():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, -torch.inf], [-500.0, -500.0, -500.0]], device=DEVICE)
    loss = cross_entropy(logits, torch.tensor([0, 1, 2], device=DEVICE), vocabulary=3)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 1.0986123], device=DEVICE), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("careful")
def test_rows_with_a_stride_give_the_bits_of_contiguous_ones():
    wide, y = random(5, 96, dtype=torch.float32, seed=1), targets(5, 64)
    assert torch.equal(
        cross_entropy(wide[:, :64], y, vocabulary=64), cross_entropy(wide[:, :64].contiguous(), y, vocabulary=64)
    )
    assert torch.equal(cross_entropy(wide.T.contiguous().T, y, vocabulary=64), cross_entropy(wide, y, vocabulary=64))


@pytest.mark.usefixtures("careful")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_the_fused_head_is_as_exact_as_its_parts(dtype, extra):
    x, w, y = random(50, 32, dtype=dtype, seed=1), random(208, 32, dtype=dtype, seed=2) / 4, targets(50, 200)
    options = {"vocabulary": 200, **extra}
    fused = lambda x, w: head_loss(x, w, y, chunk=16, **options)  # noqa: E731
    found = assert_as_exact_as_torch(fused, lambda x, w: cross_entropy_reference(x @ w.T, y, **options).sum(), [x, w])
    assert_repeats(fused, [x, w], found)


@pytest.mark.usefixtures("careful")
def test_the_fused_head_never_holds_more_logits_than_a_chunk(monkeypatch):
    from megagpt.kernels import head_loss as module

    shapes = []
    statistics = module.statistics
    monkeypatch.setattr(module, "statistics", lambda x, *rest: (shapes.append(x.shape), statistics(x, *rest))[1])
    x, w = random(20, 8, dtype=torch.float32, seed=1), random(16, 8, dtype=torch.float32, seed=2)
    with torch.no_grad():
        head_loss(x, w, targets(20, 16), vocabulary=16, chunk=8)
    assert shapes == [(8, 16), (8, 16), (4, 16)]


@pytest.mark.usefixtures("careful")
def test_gradients_agree_with_finite_differences_in_fp64():
    logits, y = random(3, 9, dtype=torch.float64, seed=1).requires_grad_(), targets(3, 7)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, y, vocabulary=7, **EXTRAS[1]), [logits])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_R": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\), but must have \(4,\)"),
        ({"logits_RV": torch.zeros(4, 8, 2)}, r"must be \[R, V\]"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    call = {"logits_RV": torch.zeros(4, 8), "targets_R": torch.zeros(4, dtype=torch.int64), "vocabulary": 8} | change
    with pytest.raises(ValueError, match=message):
        cross_entropy(call.pop("logits_RV"), call.pop("targets_R"), **call)


def test_the_fused_head_refuses_fp16_whose_scale_it_cannot_know():
    x = torch.zeros(2, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_loss needs bfloat16"):
        head_loss(x, x, torch.zeros(2, dtype=torch.int64), vocabulary=2)


def _cut_rank(rank, world, address, extra):
    """One rank of a cut vocabulary: its losses and gradients must be those of the whole."""
    torch.set_num_threads(1)
    np.seterr(over="ignore")
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    R, V, vocabulary = 9, 64, 37  # the last ranks hold padding alone
    logits, y = random(R, V, dtype=torch.float32, seed=1), targets(R, vocabulary)
    x, w = random(R, 8, dtype=torch.float32, seed=2), random(V, 8, dtype=torch.float32, seed=3)
    own = slice(rank * V // world, (rank + 1) * V // world)
    options = {"vocabulary": vocabulary, **extra}
    cut = {**options, "start": own.start, "group": dist.group.WORLD}
    loss, dlogits = with_gradients(lambda x: cross_entropy(x, y, **options), [logits], torch.float32)
    own_loss, own_dlogits = with_gradients(lambda x: cross_entropy(x, y, **cut), [logits[:, own]], torch.float32)
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_dlogits, dlogits[:, own])
    total, dx, dw = with_gradients(lambda x, w: head_loss(x, w, y, chunk=4, **options), [x, w], torch.float32)
    own_total, own_dx, own_dw = with_gradients(
        lambda x, w: head_loss(x, w, y, chunk=4, **cut), [x, w[own]], torch.float32
    )
    dist.all_reduce(own_dx)
    for one, other in ((own_total, total), (own_dx, dx), (own_dw, dw[own])):
        torch.testing.assert_close(one, other)
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo ranks on a CPU")
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_a_vocabulary_cut_over_four_ranks_gives_the_whole_ones_losses_and_gradients(tmp_path, extra):
    context = start_processes(
        _cut_rank, (4, tmp_path / "rendezvous", extra), nprocs=4, start_method="fork", join=False
    )
    assert context is not None
    while not context.join():
        pass
