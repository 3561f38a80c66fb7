"""Philox against the vectors its authors published and against Triton's."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from megagpt.philox import WORD, key_of, philox

# Random123 1.14, kat_vectors: counter, key, output of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

TRITON_PROGRAM = """
import json
import torch, triton, triton.language as tl

@triton.jit
def words(out, key, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1, w2, w3 = tl.philox(key, i, i * 0 + 7, i - 3, i * 0 + 11)
    tl.store(out + 4 * i, w0.to(tl.int64))
    tl.store(out + 4 * i + 1, w1.to(tl.int64))
    tl.store(out + 4 * i + 2, w2.to(tl.int64))
    tl.store(out + 4 * i + 3, w3.to(tl.int64))

out = torch.zeros(16, 4, dtype=torch.int64)
words[(1,)](out, 0x9234567890ABCDEF, 16)
print(json.dumps(out.tolist()))
"""


def words(counter, key):
    return tuple(int(word) for word in philox(tuple(torch.tensor([c]) for c in counter), key))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_published_known_answers_come_out(counter, key, output):
    assert words(counter, key[0] | key[1] << 32) == output


def test_a_broadcast_counter_gives_the_words_of_the_expanded_one():
    counter = (
        torch.arange(5),
        torch.arange(3)[:, None],
        torch.tensor([1 << 31, WORD])[:, None, None],
        torch.tensor(9),
    )
    expanded = tuple(part.expand(2, 3, 5).contiguous() for part in counter)
    for broadcast, whole in zip(philox(counter, 2**63 + 12345), philox(expanded, 2**63 + 12345), strict=True):
        assert torch.equal(broadcast, whole)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tritons_own_philox_gives_the_same_words(tmp_path):
    program = tmp_path / "words.py"  # a process of its own, since Triton decides at import whether it interprets
    program.write_text(TRITON_PROGRAM)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    i = torch.arange(16)
    ours = philox((i, torch.tensor(7), (i - 3) & WORD, torch.tensor(11)), 0x9234567890ABCDEF)
    assert torch.stack(ours, dim=-1).tolist() == json.loads(run.stdout)


def test_a_stream_has_its_own_key_of_64_bits_and_keeps_it():
    keys = {key_of(seed, "weights", name) for seed in (1, 2) for name in ("a", "b")}
    assert len(keys) == 4
    assert all(0 <= key < 2**64 for key in keys)
    assert key_of(1, "dropout", "embedding") == int.from_bytes(
        hashlib.sha256(b"1/dropout/embedding").digest()[:8], "little"
    )
