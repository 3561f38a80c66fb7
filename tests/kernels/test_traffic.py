"""The bytes that the interpreter counts are those that the definitions say."""

import pytest
import torch

from megagpt.kernels import tuning
from megagpt.kernels.attention import attention
from megagpt.kernels.gelu import gelu
from megagpt.kernels.norm import layernorm
from tests.kernels.helpers import DEVICE

if DEVICE.type != "cpu":
    pytest.skip("only the interpreter counts", allow_module_level=True)

from megagpt.kernels.traffic import Traffic, measure


def traffic_of(launch) -> list[Traffic]:
    return measure("sm90", iter([("it", launch)]))["it"]


def test_one_pass_over_an_elementwise_operator_moves_each_element_once():
    (found,) = traffic_of(lambda: gelu(torch.zeros(3, 1000, dtype=torch.float16)))
    assert found == Traffic("_forward", 2 * 3000 * 2, 2 * 3000 * 2)


def test_a_norms_weights_are_asked_for_by_every_program_and_needed_once():
    R, D = 50, 4096
    x, w = torch.zeros(R, D, dtype=torch.float16), torch.zeros(D, dtype=torch.float16)
    (found,) = traffic_of(lambda: layernorm(x, w, w))
    programs = -(-R // tuning.tile("norm_forward", x.dtype, D, DEVICE).rows)
    statistics = 2 * R * 4
    assert found.moved == 2 * x.nbytes + programs * 2 * w.nbytes + statistics
    assert found.least == 2 * x.nbytes + w.nbytes + statistics  # here w is b, too


def test_attention_reads_the_keys_again_for_every_tile_of_queries_and_needs_them_once():
    T, K = 256, 64
    q, k, v = (torch.zeros(1, T, 1, K, dtype=torch.float16) for _ in range(3))
    (found,) = traffic_of(lambda: attention(q, k, v, causal=False))
    tiles = T // tuning.tile("attention_forward", q.dtype, K, DEVICE).rows
    assert tiles > 1
    assert found.least == 4 * q.nbytes + T * 4
    assert found.moved == found.least + (tiles - 1) * (k.nbytes + v.nbytes)
