"""The table of peaks, and the measured peak of a CPU."""

import pytest
import torch

from megagpt.hardware import DEVICES, listed_peak, measured_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_a_driver_s_name_finds_its_row(name, precision, tflops):
    peak = listed_peak(name, precision)
    assert peak.flops_per_s == pytest.approx(tflops * 1e12)
    assert peak.source.startswith(("NVIDIA", "AMD"))


@pytest.mark.parametrize("name", ["NVIDIA H1000", "Tesla K80", "NVIDIA L400", ""])
def test_a_name_that_only_resembles_a_row_is_unknown(name):
    assert listed_peak(name, "bf16").source == "unknown"
    assert listed_peak(name, "bf16").flops_per_s == 0


def test_a_device_without_bf16_has_no_bf16_peak():
    assert listed_peak("Tesla V100-SXM2-16GB", "bf16").source == "unknown"


def test_every_row_can_be_reached():
    """A row behind a less particular one of the same family would never apply."""
    for device in DEVICES:
        assert listed_peak(" ".join(device.words), "fp16").source == device.source


def test_a_cpu_is_measured_on_the_threads_in_use():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = peak_flops(torch.device("cpu"), "fp32")
    finally:
        torch.set_num_threads(threads)
    assert peak.source == "measured on 1 CPU thread"
    assert 1e8 < peak.flops_per_s < 1e13


def test_the_measured_peak_is_the_product_s_operations_over_its_shortest_time(monkeypatch):
    readings = iter([0.0, 1.0, 1.4, 2.0, 2.1, 3.0, 3.5, 10.0])  # the end is at 5; products take 0.4, 0.1 and 0.5 s
    monkeypatch.setattr("megagpt.hardware.time.perf_counter", lambda: next(readings))
    assert measured_peak("fp32", seconds=5.0, size=8).flops_per_s == pytest.approx(2 * 8**3 / 0.1)


def test_a_device_of_another_kind_has_no_peak():
    assert peak_flops(torch.device("meta"), "bf16").source == "unknown"
