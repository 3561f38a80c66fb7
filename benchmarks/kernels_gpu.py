# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
"""The kernels on a GPU: right, the same bits in 100 runs, and how fast beside what else there is.

    python -m benchmarks.kernels_gpu [--quick] [--out benchmarks/results/kernels_gpu.json]

Attention at GPT-3's head widths and 1k to 16k tokens (16k tokens a batch, 2,048 features), causal, banded, in
documents, full and across, beside torch's flash and cuDNN attention, FlexAttention and, where installed, flash-attn;
norms, their fusion with the residual, and cross entropy beside torch, torch.compile and, where installed,
Liger-Kernel. A peer that fails is listed with its error. A rate counts the operations of visible pairs (4 K forward,
10 K backward) or the bytes that must move. Stays under 8 minutes: shapes that there is no time for are listed as left
out.
"""

from __future__ import annotations

import argparse
import functools
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
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt import ops
from megagpt.kernels import tuning
from megagpt.kernels.attention import attention
from megagpt.kernels.cross_entropy import cross_entropy
from megagpt.kernels.norm import add_layernorm, layernorm

BUDGET_SECONDS = 420
BATCH_TOKENS, WIDTH = 16_384, 2048
DEVICE = "cuda"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention: T queries of K features, over T keys or as many as `keys` says."""

    T: int
    K: int
    causal: bool = True
    window: int | None = None
    document: int | None = None
    """Tokens of each document of a row; T is a multiple."""
    keys: int | None = None

    def name(self) -> str:
        kind = "causal" if self.causal else "full" if self.keys is None else f"across {self.keys:,} keys"
        extra = (
            f", band of {self.window}" if self.window else f", documents of {self.document}" if self.document else ""
        )
        return f"T {self.T:,} K {self.K} {kind}{extra}"

    def pairs(self) -> int:
        """Visible pairs of one head and row."""
        if not self.causal:
            return self.T * (self.keys or self.T)
        length = self.document or self.T
        seen = min(self.window or length, length)
        return self.T // length * (length * seen - seen * (seen - 1) // 2)


NORM_WIDTHS = (768, 2048, 4096, 12_288)
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
SHAPES = (
    *(Shape(T=T, K=128) for T in LENGTHS), *(Shape(T=T, K=64) for T in LENGTHS),
    *(Shape(T=T, K=128, window=256) for T in LENGTHS[-2:]), Shape(T=8192, K=128, document=1024),
    Shape(T=2048, K=64, causal=False), Shape(T=8192, K=128, causal=False),
    Shape(T=2048, K=128, causal=False, keys=8192), Shape(T=8192, K=96), Shape(T=8192, K=80),
)  # fmt: skip
QUICK = (Shape(T=1024, K=128), Shape(T=8192, K=64), Shape(T=8192, K=128, window=256))


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
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


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


def attention_peers(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other systems' attention on [B, T, N, K]."""
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    plain = shape.window is None and shape.document is None

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*turned, is_causal=shape.causal)

    if plain:
        yield "torch, flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
        yield "torch, cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach, length = shape.window or shape.T, shape.document or shape.T
    seen = lambda b, h, i, j: (i >= j) & (i - j < reach) & (i // length == j // length)  # noqa: ARG005, E731
    mask = create_block_mask(seen, None, None, shape.T, shape.T, device=DEVICE) if shape.causal else None
    torch._dynamo.reset()  # or the ninth shape passes the limit on recompilation, and runs unfused
    flex = torch.compile(flex_attention, dynamic=False)
    yield "FlexAttention", lambda: flex(*turned, block_mask=mask)
    if importlib.util.find_spec("flash_attn") and shape.document is None:
        from flash_attn import flash_attn_func

        band = (-1, -1) if shape.window is None else (shape.window - 1, 0)
        yield (
            "flash-attn",
            lambda: flash_attn_func(q, k, v, causal=shape.causal, window_size=band, deterministic=True),
        )


def measure_attention(*, quick: bool, deadline: float) -> Iterator[Result]:
    for shape in QUICK if quick else SHAPES:
        T, K = shape.T, shape.K
        B, N = max(1, BATCH_TOKENS // T), max(1, WIDTH // K)
        size = f"B {B} N {N} {shape.name()}"
        if time.monotonic() > deadline:
            yield Result(what="attention", size=size, system="all", error="left out: no time")
            continue
        q, k, v = normal(B, T, N, K), normal(B, shape.keys or T, N, K), normal(B, shape.keys or T, N, K)
        work = (4e-9 * K * B * N * shape.pairs(), 10e-9 * K * B * N * shape.pairs())
        start_BT = None
        if shape.document is not None:
            place = torch.arange(T, device=DEVICE, dtype=torch.int32)
            start_BT = (place // shape.document * shape.document).expand(B, T).contiguous()
        ours = functools.partial(
            attention, q, k, v, causal=shape.causal, window=shape.window, document_start_BT=start_BT
        )
        for system, run in (("megagpt", ours), *attention_peers(q, k, v, shape)):
            yield timed("attention", size, system, run, [q, k, v], work)


def norm_systems(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """What is measured -> system -> run; the fused ones give the sum of y and h, so that both get a gradient."""
    D = x.shape[-1]
    plain = lambda: F.layer_norm(x, (D,), w, b)  # noqa: E731

    def fused() -> Tensor:
        h = residual + x
        return torch.stack((F.layer_norm(h, (D,), w, b), h))

    torch._dynamo.reset()
    found: dict[str, dict[str, Callable[[], Tensor]]] = {
        "layernorm": {
            "megagpt": lambda: layernorm(x, w, b), "torch": plain, "torch.compile": torch.compile(plain),
        },
        "residual + layernorm": {
            "megagpt": lambda: torch.stack(add_layernorm(x, residual, w, b)), "torch": fused,
            "torch.compile": torch.compile(fused),
        },
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        found["layernorm"]["Liger"] = lambda: LigerLayerNormFunction.apply(x, w, b, 1e-5)
    return found


def measure_norm(*, quick: bool) -> Iterator[Result]:
    """Of the fused norm all systems pay for stacking y and h too: those rates only compare."""
    for D in (4096,) if quick else NORM_WIDTHS:
        R = BATCH_TOKENS * WIDTH // D
        x, residual, w, b = normal(R, D), normal(R, D), normal(D), normal(D)
        moved = R * D * 2e-6
        for what, systems in norm_systems(x, residual, w, b).items():
            fused = what != "layernorm"
            inputs = [x, residual, w, b] if fused else [x, w, b]
            work = (8 * moved, 8 * moved) if fused else (2 * moved, 3 * moved)
            for system, run in systems.items():
                yield timed(what, f"{R:,} x {D:,}", system, run, inputs, work)


def measure_loss() -> Iterator[Result]:
    R, V = BATCH_TOKENS // 2, 50_304
    logits, y = normal(R, V), torch.randint(0, 50_257, (R,), device=DEVICE)
    plain = lambda: F.cross_entropy(logits.float(), y, reduction="none")  # noqa: E731
    torch._dynamo.reset()
    systems = {
        "megagpt": lambda: cross_entropy(logits, y, vocabulary=50_257), "torch": plain,
        "torch.compile": torch.compile(plain),
    }  # fmt: skip
    moved = R * V * 2e-6
    for system, run in systems.items():
        yield timed("cross entropy", f"{R:,} x {V:,}", system, run, [logits], (moved, 2 * moved))
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        # Its forward writes the gradient over the logits, so it comes last; compare the sums of both times.
        run = lambda: LigerCrossEntropyFunction.apply(logits, y, None, -100, 0.0, 0.0, "none")[0]  # noqa: E731
        yield timed("cross entropy", f"{R:,} x {V:,}", "Liger", run, [logits], (moved, 2 * moved))


def copy_rate() -> float:
    """GB/s of a plain copy of 512 MB: what the norms' rates are a share of."""
    x = torch.empty(2**28, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes * 1e-6 / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median")


def repeats(runs: int) -> dict[str, bool]:
    """Whether outputs and gradients of attention, a norm and the loss are the same bits in `runs` runs."""
    found = {}
    targets = torch.randint(0, 50_257, (500,), device=DEVICE)
    for name, inputs, run in (
        ("attention", [normal(2, 1537, 8, 128) for _ in range(3)], lambda q, k, v: attention(q, k, v, window=700)),
        ("layernorm", [normal(5000, 4096), normal(4096), normal(4096)], layernorm),
        ("cross entropy", [normal(500, 50_304)], lambda x: cross_entropy(x, targets, vocabulary=50_257)),
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
    parser.add_argument("--quick", action="store_true", help="three shapes and one width")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    # Gradients are taken many times from one forward, which a compiled backward that reuses its inputs refuses.
    torch._functorch.config.donated_buffer = False
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
        sys.stdout.write(f"{one.what:20} {one.size:44} {one.system:14} {rates}\n")
    if options.out:
        record = {
            "command": "python -m benchmarks.kernels_gpu" + (" --quick" if options.quick else ""),
            "date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__,
            "table": tuning.digest(torch.device(DEVICE)), "same_bits": same, "error_over_torchs": error,
            "copy_gb_per_s": copied, "units": "TFLOP/s for attention, GB/s for the rest",
            "results": [asdict(one) for one in results],
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(same.values()) and max(error.values()) <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
