"""What a device can compute at best: the denominator of MFU, and where the number comes from.

Only dense peaks stand here, without structured sparsity, at the boost clock and power limit of the vendor's sheet:
a sheet that prints a figure "with sparsity" is halved. Half precision is bf16 or fp16 with fp32 accumulation, which is
what training runs; fp32 is plain fp32 without TF32, as torch multiplies by default. A CPU has no such sheet, since
clocks and vector units differ from one machine to the next: its peak is measured on the threads that are in use.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Device:
    """One row of the table. The first row whose words all stand in the device's name applies."""

    words: tuple[str, ...]
    half: float
    """Dense TFLOP/s in bf16 and fp16."""
    single: float
    """Dense TFLOP/s in fp32."""
    source: str
    bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of one device, and where the number comes from; `source` is "unknown" where there is none (0 FLOP/s)."""

    flops_per_s: float
    source: str


# More words stand before fewer of the same family. Two-die AMD cards appear as two devices: half the sheet's figure.
DEVICES = (
    Device(words=("GB300",), half=2500, single=80, source="NVIDIA GB300 NVL72 specifications, a 72nd"),
    Device(words=("B300",), half=2250, single=75, source="NVIDIA HGX platform specifications, HGX B300, an eighth"),
    Device(words=("GB200",), half=2500, single=80, source="NVIDIA GB200 NVL72 datasheet, a 72nd"),
    Device(words=("B200",), half=2250, single=75, source="NVIDIA HGX platform specifications, HGX B200, an eighth"),
    Device(words=("GH200",), half=989.5, single=67, source="NVIDIA GH200 Grace Hopper Superchip datasheet"),
    Device(words=("H200", "NVL"), half=835.5, single=60, source="NVIDIA H200 Tensor Core GPU datasheet, NVL"),
    Device(words=("H200",), half=989.5, single=67, source="NVIDIA H200 Tensor Core GPU datasheet, SXM"),
    Device(words=("H100", "NVL"), half=835.5, single=60, source="NVIDIA H100 Tensor Core GPU datasheet, NVL"),
    Device(words=("H100", "PCIE"), half=756, single=51, source="NVIDIA H100 Tensor Core GPU datasheet (2022), PCIe"),
    Device(words=("H100",), half=989.5, single=67, source="NVIDIA H100 Tensor Core GPU datasheet, SXM"),
    Device(words=("A100",), half=312, single=19.5, source="NVIDIA A100 Tensor Core GPU datasheet"),
    Device(words=("L40S",), half=362, single=91.6, source="NVIDIA L40S datasheet"),
    Device(words=("L40",), half=181, single=90.5, source="NVIDIA L40 datasheet"),
    Device(words=("L4",), half=121, single=30.3, source="NVIDIA L4 Tensor Core GPU datasheet"),
    Device(words=("A10",), half=125, single=31.2, source="NVIDIA A10 Tensor Core GPU datasheet"),
    Device(words=("RTX", "5090"), half=209.5, single=104.8, source="NVIDIA RTX Blackwell GPU architecture, app. A"),
    Device(words=("RTX", "4090"), half=165.2, single=82.6, source="NVIDIA Ada GPU architecture, appendix A"),
    Device(words=("RTX", "3090"), half=71, single=35.6, source="NVIDIA Ampere GA102 GPU architecture, appendix A"),
    Device(words=("RTX", "6000", "ADA"), half=364.2, single=91.1, source="NVIDIA RTX 6000 Ada Generation datasheet"),
    Device(words=("RTX", "A6000"), half=154.8, single=38.7, source="NVIDIA RTX A6000 datasheet"),
    Device(words=("V100", "PCIE"), half=112, single=14, source="NVIDIA V100 datasheet, PCIe", bf16=False),
    Device(words=("V100",), half=125, single=15.7, source="NVIDIA V100 datasheet, SXM2", bf16=False),
    Device(words=("T4",), half=65, single=8.1, source="NVIDIA T4 datasheet", bf16=False),
    Device(words=("MI355X",), half=2516.6, single=157.3, source="AMD Instinct MI355X data sheet"),
    Device(words=("MI325X",), half=1307.4, single=163.4, source="AMD Instinct MI325X data sheet"),
    Device(words=("MI300X",), half=1307.4, single=163.4, source="AMD Instinct MI300X data sheet"),
    Device(words=("MI250X",), half=191.5, single=23.95, source="AMD Instinct MI250X data sheet, one of two dies"),
)


def listed_peak(name: str, precision: Precision) -> Peak:
    """The table's peak for the device that its driver calls `name`, in any case; "unknown" if no row fits it."""
    words = set(name.upper().replace("-", " ").replace("_", " ").split())
    for device in DEVICES:
        if words.issuperset(device.words):
            if precision == "bf16" and not device.bf16:
                return Peak(flops_per_s=0.0, source="unknown")
            return Peak(
                flops_per_s=(device.single if precision == "fp32" else device.half) * TERA, source=device.source
            )
    return Peak(flops_per_s=0.0, source="unknown")


def measured_peak(precision: Precision, seconds: float = 0.2, size: int = 512) -> Peak:
    """The best of as many CPU products of two `size` x `size` matrices as fit in `seconds`, on torch's threads."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product = a @ b
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        torch.mm(a, b, out=product)
        best = min(best, time.perf_counter() - start)
    threads = torch.get_num_threads()
    return Peak(flops_per_s=2 * size**3 / best, source=f"measured on {threads} CPU thread{'s' * (threads > 1)}")


def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """The dense peak of one `device` at `precision`: from the table for a GPU, measured within 0.3 s for a CPU."""
    import torch

    if device.type == "cpu":
        return measured_peak(precision)
    if device.type == "cuda":  # also what ROCm builds of torch call an AMD device
        return listed_peak(torch.cuda.get_device_name(device), precision)
    return Peak(flops_per_s=0.0, source="unknown")
