# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
"""The kernels on a GPU: right, the same bits in 100 runs, and how fast beside what else there is.

    python -m benchmarks.kernels_gpu [--quick] [--out benchmarks/results/kernels_gpu.json]

Attention at GPT-3's head widths and 1k to 16k tokens (16k tokens a batch, 2,048 features) beside torch's flash and
cuDNN attention, FlexAttention and, where installed, flash-attn; norms and cross entropy beside torch, torch.compile
and, where installed, Liger-Kernel. A peer that fails is listed with its error. A rate counts the operations of
visible pairs (4 K forward, 10 K backward) or the bytes that must move. Stays under 8 minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt import ops
from megagpt.kernels import tuning
from megagpt.kernels.attention import attention
from megagpt.kernels.cross_entropy import cross_entropy
from megagpt.kernels.norm import layernorm

BUDGET_SECONDS = 420


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement: `rate` is TFLOP/s of attention, GB/s of the rest; 0 with an error."""

    what: str
    size: str
    system: str
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    forward_rate: float = 0.0
    backward_rate: float = 0.0
    error: str = ""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def timed(
    what: str, size: str, system: str, run: Callable[[], Tensor], inputs: list[Tensor], work: tuple[float, float]
) -> Result:
    """Median times of forward and backward; `work` is what each does, in 1e9 operations or bytes."""
    try:
        out = run()
        upstream = torch.randn_like(out)
        bench = triton.testing.do_bench
        forward = bench(lambda: run().detach(), warmup=20, rep=80, return_mode="median")
        backward = bench(
            lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True),
            warmup=20,
            rep=80,
            return_mode="median",
        )
    except Exception as error:
        return Result(what=what, size=size, system=system, error=f"{type(error).__name__}: {str(error)[:100]}")
    return Result(
        what=what, size=size, system=system, forward_ms=forward, backward_ms=backward,
        forward_rate=work[0] / forward, backward_rate=work[1] / backward,
    )  # fmt: skip


def attention_peers(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other systems' causal attention on [B, T, N, K]."""
    turned = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*turned, is_causal=True)

    if window is None:
        yield "torch, flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
        yield "torch, cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = q.shape[1] if window is None else window
    seen = lambda b, h, i, j: (i >= j) & (i - j < reach)  # noqa: ARG005, E731
    mask = create_block_mask(seen, None, None, q.shape[1], q.shape[1], device="cuda")
    flex = torch.compile(flex_attention, dynamic=False)
    yield "FlexAttention", lambda: flex(*turned, block_mask=mask)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        band = (-1, -1) if window is None else (window - 1, 0)
        yield "flash-attn", lambda: flash_attn_func(q, k, v, causal=True, window_size=band, deterministic=True)


def measure_attention(*, quick: bool, deadline: float) -> Iterator[Result]:
    lengths = (1024, 8192) if quick else (1024, 2048, 4096, 8192, 16_384)
    for K, window in ((128, None), (64, None), (128, 256), (96, None), (80, None)):
        for T in lengths if window is None else lengths[-2:]:
            if time.monotonic() > deadline:
                return
            B, N = max(1, 16_384 // T), 2048 // K
            q, k, v = (normal(B, T, N, K) for _ in range(3))
            pairs = T * (T + 1) / 2 if window is None else T * window - window * (window - 1) / 2
            work = (4e-9 * K * B * N * pairs, 10e-9 * K * B * N * pairs)
            size = f"B {B} T {T} N {N} K {K}" + (f" window {window}" if window else "")
            ours = lambda q=q, k=k, v=v, window=window: attention(q, k, v, window=window)  # noqa: E731
            for system, run in (("megagpt", ours), *attention_peers(q, k, v, window)):
                yield timed("attention", size, system, run, [q, k, v], work)


def measure_norm(*, quick: bool) -> Iterator[Result]:
    for D in (4096,) if quick else (768, 2048, 4096, 12_288):
        R = 32_768 * 1024 // D
        x, w, b = normal(R, D), normal(D), normal(D)
        plain = lambda x=x, w=w, b=b, D=D: F.layer_norm(x, (D,), w, b)  # noqa: E731
        systems = {
            "megagpt": lambda x=x, w=w, b=b: layernorm(x, w, b),
            "torch": plain,
            "torch.compile": torch.compile(plain),
        }
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            systems["Liger"] = lambda x=x, w=w, b=b: LigerLayerNormFunction.apply(x, w, b, 1e-5)
        moved = R * D * 2e-6
        for system, run in systems.items():
            yield timed("layernorm", f"{R:,} x {D:,}", system, run, [x, w, b], (2 * moved, 3 * moved))


def measure_loss() -> Iterator[Result]:
    R, V = 8192, 50_304
    logits, y = normal(R, V), torch.randint(0, 50_257, (R,), device="cuda")
    plain = lambda: F.cross_entropy(logits.float(), y, reduction="none")  # noqa: E731
    systems = {
        "megagpt": lambda: cross_entropy(logits, y, vocabulary=50_257), "torch": plain,
        "torch.compile": torch.compile(plain),
    }  # fmt: skip
    moved = R * V * 2e-6
    for system, run in systems.items():
        yield timed("cross entropy", f"{R:,} x {V:,}", system, run, [logits], (moved, 2 * moved))


def copy_rate() -> float:
    """GB/s of a plain copy of 512 MB: what the norms' rates are a share of."""
    x = torch.empty(2**28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes * 1e-6 / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median")


def repeats(runs: int) -> dict[str, bool]:
    """Whether outputs and gradients of attention and of a norm are the same bits in `runs` runs."""
    found = {}
    for name, inputs, run in (
        ("attention", [normal(2, 1537, 8, 128) for _ in range(3)], lambda q, k, v: attention(q, k, v, window=700)),
        ("layernorm", [normal(5000, 4096), normal(4096), normal(4096)], layernorm),
    ):
        out = run(*inputs)
        upstream = torch.randn_like(out)
        first = (out, *torch.autograd.grad(out, inputs, upstream))
        same = True
        for _ in range(runs):
            out = run(*inputs)
            again = (out, *torch.autograd.grad(out, inputs, upstream))
            same &= all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        found[name] = same
    return found


def largest_error() -> dict[str, float]:
    """Attention's largest error against fp64 over that of torch's own in bf16; at most 2 is right."""
    q, k, v = (normal(1, 777, 4, 128) for _ in range(3))
    truth = ops.attention(q.double(), k.double(), v.double())
    near = (ops.attention(q, k, v) - truth).abs().max()
    return {"attention": ((attention(q, k, v) - truth).abs().max() / near).item()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths and one width of each")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    deadline = time.monotonic() + BUDGET_SECONDS
    same, error, copied = repeats(100), largest_error(), copy_rate()
    sys.stdout.write(f"same bits in 100 runs: {same}; error over torch's: {error}; copy {copied:,.0f} GB/s\n")
    results = []
    for result in (*measure_norm(quick=options.quick), *measure_loss()):
        results.append(result)
    for result in measure_attention(quick=options.quick, deadline=deadline):
        results.append(result)
    for one in results:
        rates = one.error or f"forward {one.forward_rate:7.0f}  backward {one.backward_rate:7.0f}"
        sys.stdout.write(f"{one.what:14} {one.size:32} {one.system:14} {rates}\n")
    if options.out:
        record = {
            "command": "python -m benchmarks.kernels_gpu" + (" --quick" if options.quick else ""),
            "date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__,
            "table": tuning.digest(torch.device("cuda")), "same_bits": same, "error_over_torchs": error,
            "copy_gb_per_s": copied, "units": "TFLOP/s for attention, GB/s for the rest",
            "results": [asdict(one) for one in results],
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(same.values()) and max(error.values()) <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
