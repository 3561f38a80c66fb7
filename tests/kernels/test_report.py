"""What the compiler makes of the kernels, without a GPU, and the rules that judge it; and the tables of tiles."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from megagpt.kernels import tuning
from megagpt.kernels.report import broken_rules
from megagpt.kernels.resources import Resources, _innermost_loops, _instructions, _longest_skip
from megagpt.kernels.visits import tiles_visited

CLEAN = {
    "kernel": "forward", "architecture": "sm90", "registers": 200, "shared_bytes": 1000, "warps": 8,
    "hot": {"HGMMA.64x128x16.F32": 12, "WARPGROUP.ARRIVE": 3, "LDGSTS.E.BYPASS.LTC128B.128": 8, "LDG.E": 2},
    "whole": {}, "skipped": 0, "constants": {}, "notes": (),
}  # fmt: skip
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/                   FADD R4, R4, R5 ;
        /*00a0*/                   NOP ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def resources(**changes) -> Resources:
    found = {**CLEAN, **changes}
    found["hot"], found["whole"] = Counter(found["hot"]), Counter(found["whole"])
    return Resources(**found)


def test_a_clean_kernel_breaks_no_rule():
    assert broken_rules("attention 64", resources(), torch.bfloat16) == ((), "")


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("spills", {"hot": {**CLEAN["hot"], "LDL.64": 1}}),
        ("serialised", {"notes": ("C7515",)}),
        ("serialised", {"hot": {**CLEAN["hot"], "WARPGROUP.ARRIVE": 24}}),
        ("no tensor", {"hot": {"HMMA.16816": 4, "LDG.E.128": 1}}),
        ("narrow loads", {"hot": {"HGMMA": 4, "LDG.E.128": 1, "LDG.E.U16": 8}}),
        ("narrow loads", {"hot": {"HGMMA": 4, "LDG.E.64": 8}}),
        ("shared", {"shared_bytes": 300_000}),
        ("atomics", {"whole": {"REDG.E.ADD.F32": 1}}),
    ],
)
def test_each_rule_is_broken_by_what_it_forbids(rule, changes):
    assert broken_rules("attention 64", resources(**changes), torch.bfloat16) == ((rule,), "")


def test_a_known_spill_is_waived_with_its_reason_and_nothing_else_is():
    spilled = resources(hot={**CLEAN["hot"], "STL": 9}, shared_bytes=300_000)
    broken, why = broken_rules("attention 256", spilled, torch.bfloat16)
    assert broken == ("shared",)
    assert "256 features" in why


def test_the_loop_and_what_it_can_skip_are_read_from_the_machine_code():
    code = _instructions(LISTING)
    ((start, end),) = _innermost_loops(code)
    loop = Counter(opcode for _, opcode, _ in code[start : end + 1])
    assert loop == {"LDG.E.128": 1, "BRA": 2, "FADD": 7}
    assert _longest_skip(code, start, end) == 2


def test_the_short_report_breaks_no_rule_on_an_h100():
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megagpt.kernels.report"], capture_output=True, text=True, env=clean
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "no kernel breaks a rule" in found.stdout
    assert found.stdout.count(" ok") >= 13
    rows = [line.split() for line in found.stdout.splitlines() if line.endswith(" ok")]
    once = [row[-2] for row in rows if row[:2] == ["cross", "entropy"]]
    assert once == ["1.00", "1.00"]  # the loss goes over the logits once forward and once backward


@pytest.mark.parametrize("name", ["sm80", "sm86", "sm90", "sm100", "gfx942"])
def test_every_table_has_a_tile_for_every_kernel_and_width(name, monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda _: name)
    kernels = tuning.table(name)["kernels"]
    assert set(kernels) == set(tuning.table("sm90")["kernels"])
    for kernel, kinds in kernels.items():
        for dtype in (torch.float32, torch.bfloat16):
            if kernel == "sum_partials" and dtype == torch.bfloat16:
                continue  # partial sums are fp32
            width = 256 if kernel.startswith("attention") else 16_384 if kernel.startswith("norm") else 1
            cut = tuning.tile(kernel, dtype, width, torch.device("cpu"))
            assert cut.rows & (cut.rows - 1) == 0
            assert cut.columns & (cut.columns - 1) == 0
        widths = [[entry["width"] for entry in entries] for entries in kinds.values()]
        assert widths == [sorted(each) for each in widths]


def test_a_width_beyond_the_table_is_named():
    with pytest.raises(ValueError, match="attention_forward: width 300 is over the widest"):
        tuning.tile("attention_forward", torch.bfloat16, 300, torch.device("cpu"))


def test_documents_and_bands_are_counted_in_tiles():
    assert tiles_visited(256, rows=64, columns=64, causal=False) == 16
    assert tiles_visited(256, rows=64, columns=64) == 10
    assert tiles_visited(256, rows=64, columns=64, lengths=[64] * 4) == 4
    assert tiles_visited(256, rows=64, columns=64, window=1) == 4
    with pytest.raises(ValueError, match="documents of 3 tokens do not fill 4"):
        tiles_visited(4, rows=2, columns=2, lengths=[3])
