"""Every setting of a run, as one tree of frozen dataclasses; the only place where defaults live.

A preset (`megagpt/presets/*.toml`) or a run's `run.toml` holds only what differs from the defaults. Values that
follow from others are methods, never fields. `checked(run)` refuses every combination that cannot work, before any
rank starts. Nothing here imports torch: `megagpt --help` stays instant.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from megagpt import settings
from megagpt.errors import UserError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"


def _mixture(words: list[str]) -> dict[str, int]:
    """What follows --data.mixture on the command line: corpora/prose 1 corpora/code 3."""
    if len(words) % 2 or not all(weight.isdecimal() for weight in words[1::2]):
        raise ValueError(f"after each corpus folder stands its weight, a whole number: got {' '.join(words)}")
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


_MIXTURE = PrimitiveConstructorSpec(
    nargs="*",
    metavar="CORPUS WEIGHT ...",
    instance_from_str=_mixture,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The GPT: how large it is and which of the published choices it makes."""

    layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Features of the residual stream."""
    heads: int = 12
    """Query heads; they divide the width."""
    kv_heads: int | None = None
    """Key and value heads, a divisor of the heads (grouped-query attention). None: as many as heads."""
    hidden: int | None = None
    """Features inside the feed-forward layer. None: 4 x width, or 8/3 x width rounded up to 64 for swiglu."""
    vocabulary: int = 50_257
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    context: int = 1024
    """Tokens in one sequence."""
    window: int | None = None
    """Tokens that the banded layers (the second, the fourth, ...) see, themselves included. None: all layers dense."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Which normalisation stands before attention, before the feed-forward layer and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norms."""
    positions: Literal["learned", "rotary"] = "learned"
    """How a token knows its place: an embedding a position, or rotated queries and keys (RoPE)."""
    rotary_base: float = 10_000.0
    """RoPE's theta; larger for longer contexts."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward layer: two matrices around a GELU, or three with a gated SiLU."""
    biases: Literal["all", "no_qkv", "none"] = "all"
    """Which linear layers have a bias: all (GPT-2), all but queries, keys and values (GPT-Neo), or none (Llama)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before the rotation (Qwen3)."""
    tied: bool = True
    """The head uses the embedding's matrix."""
    dropout: float = 0.0
    """Rate on the embedding, on attention weights and on both residual branches, from 0 to below 1."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; matrices that write to the residual stream get it over sqrt(2 L)."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Which implementation of each operator runs; auto takes triton where it works, and says so."""

    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def head_width(self) -> int:
        return self.width // self.heads

    def feed_forward_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.feed_forward == "gelu" else -(-8 * self.width // (3 * 64)) * 64

    def layer_window(self, layer: int) -> int | None:
        """Tokens that block `layer` (from 0) sees, or None if it is dense: dense and banded blocks alternate."""
        return self.window if layer % 2 == 1 else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the model reads."""

    mixture: Annotated[dict[str, int], _MIXTURE] = field(default_factory=dict)
    """Corpus, a folder or a URL -> integer weight: of each `sum of weights` sequences so many come from it."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """chunk: documents end to end, cut at every context; best_fit: whole documents, fewer cuts, a little padding."""
    document_mask: bool = False
    """Keep attention and positions inside each document of a sequence."""
    prefetch: int = 4
    """Batches read ahead by the loader's thread."""
    cache: str = "~/.cache/megagpt"
    """Folder for what is read from stores (s3:// and the like): on a disk of the node, shared by all its ranks."""
    cache_gib: float = 100.0
    """GiB that the cache may hold; what was unused the longest is deleted."""
    remote: Literal["auto", "shards", "blocks"] = "auto"
    """Read whole shards from a store, or the blocks that are needed. auto: shards if the cache holds them."""
    patience: float = 300.0
    """Seconds that one read from a store is tried again before the run stops."""
    bad_block: Literal["stop", "substitute"] = "stop"
    """A block that is broken in its store, however often it is fetched, ends the run; or others are read in its place,
    the same on every rank and at every replay, up to 16 blocks."""
    max_epochs: int | None = None
    """Times that the run may read a corpus: one that would read it more often is refused. None: no limit."""
    window: int | None = None
    """Shards whose sequences are shuffled together, for corpora that are fetched. None: all of a corpus."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How one model is cut over the cluster: world size = data * pipeline * tensor."""

    data: int = 1
    """Replicas of the model, each with its own part of every batch."""
    pipeline: int = 1
    """Stages that the layers are cut into."""
    tensor: int = 1
    """Ranks sharing every matrix multiply. Keep it inside one node."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What data-parallel ranks shard: 1 optimizer state, 2 also gradients, 3 also weights."""
    sequence_parallel: bool = False
    """Tensor ranks also share the tokens in norms, dropout and residuals: less memory, the same traffic."""
    offload: bool = False
    """Keep masters and moments in the CPU's memory and update there; needs zero_stage 1 to 3 and pipeline 1."""

    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule. Everything is counted in tokens, so that it holds on any batch size."""

    lr: float = 6e-4
    """Learning rate after the warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay; stable, then a linear decay (wsd); or constant."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay_tokens: int | None = None
    """Tokens at which cosine or wsd has reached its floor, which then holds. None: train.tokens."""
    wsd_decay: float = 0.2
    """wsd: the share of decay_tokens, at their end, over which the rate falls."""
    lr_floor: float = 0.1
    """The share of lr that the schedule ends at."""
    beta1: float = 0.9
    """AdamW's memory of gradients."""
    beta2: float = 0.95
    """AdamW's memory of squared gradients."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: float = 0.1
    """Decay of the matrices and embeddings; norms and biases have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; 0 does not clip."""
    clip_value: float = 0.0
    """Largest magnitude of a gradient element after the norm was clipped; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, in which batches and in which precision."""

    tokens: int = 1_000_000_000
    """Tokens of the whole run: the schedule's length."""
    steps: int | None = None
    """Stop after so many steps in all, earlier than train.tokens says; the schedule stays as it is."""
    global_batch: int = 512
    """Sequences of one step, over all ranks."""
    micro_batch: int = 8
    """Sequences that one rank computes at once; gradient accumulation follows from it."""
    ramp_start: int | None = None
    """Sequences of the first step, if the batch is to grow. None: no ramp."""
    ramp_increment: int = 16
    """Sequences by which the ramp grows; a multiple of micro_batch x parallel.data."""
    ramp_tokens: int = 0
    """Tokens over which the batch grows from ramp_start to global_batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and activations; masters, moments and statistics stay in fp32. fp16 scales the loss."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward: none; each block's feed-forward layer; each whole block."""
    eval_every: int = 500
    """Steps between two evaluations on the held-out documents; 0: none until the end, and there of what has any."""
    eval_sequences: int = 256
    """Held-out sequences of one evaluation."""
    guard_every: int = 100
    """Steps between two checks that ranks which must read the same batch, or hold the same weights, do; 0: none."""

    def batch_at(self, tokens: int) -> int:
        """Sequences of the step that begins after `tokens` tokens: the ramp is linear in tokens, in increments."""
        if self.ramp_start is None or tokens >= self.ramp_tokens:
            return self.global_batch
        increments = (self.global_batch - self.ramp_start) // self.ramp_increment
        return self.ramp_start + self.ramp_increment * (tokens * (increments + 1) // self.ramp_tokens)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the run is saved. It is always saved at its end and when it is told to stop."""

    every: int = 500
    """Steps between two checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that stay; older ones are deleted after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for ever; 0: none."""
    keep_best: int = 0
    """Checkpoints with the lowest loss on held-out text that stay as well; only steps with an evaluation count."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on."""
    mtbf_hours: float = 0.0
    """Mean hours between failures of the job. Above 0, the first save is after `every` steps, and from then on the
    interval is Young and Daly's for the save's measured cost."""
    folder: str = ""
    """Where checkpoints are kept, a path or s3://bucket/folder; empty: OUT/checkpoints."""
    local: str = ""
    """A folder on each node's own disk: every rank also keeps its state there and on the next node, which is used at
    the next start where it is newer than the checkpoints. Empty: none."""
    local_every: int = 50
    """Steps between two such copies."""


@dataclass(frozen=True, kw_only=True)
class Heal:
    """What a run does about faults in mid-run (docs/resilience.md)."""

    skip_budget: int = 5
    """Steps without a finite loss and gradient that may be skipped among any 100; one more, and the run ends."""
    spike_score: float = 0.0
    """A loss so many robust deviations above the median of its window is a spike; 0: spikes are left alone."""
    spike_steps: int = 3
    """Steps in a row above it; then the run goes back to the checkpoint before and leaves out the data since."""
    spike_window: int = 128
    """Finished steps whose losses are the yardstick."""
    rollbacks: int = 3
    """Times that a run may go back because of a spike; one more spike, and it ends."""
    recompute_every: int = 0
    """Steps between two that are computed twice and compared bit for bit, to find faulty devices; 0: none."""
    hang_factor: float = 3.0
    """A rank hangs if it makes no progress for so many median steps plus hang_seconds."""
    hang_seconds: float = 120.0
    """See hang_factor."""
    slow_seconds: float = 1800.0
    """The limit without progress in what has no usual time: start, first step, save and evaluation."""
    straggler: float = 1.3
    """Ranks that take so many times the median of their peers' own time are reported."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the run tells, and to whom. `metrics.jsonl` and `report.html` are always written."""

    every: int = 10
    """Steps between two lines on the console."""
    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard (needs the extra 'tensorboard')."""
    wandb: str = ""
    """Weights & Biases project to report to (needs the extra 'wandb'); empty: none."""
    samples: int = 2
    """Texts that are generated after the last step, for the report."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, whole: `run.toml` in its folder repeats it."""

    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    parallel: Parallel = Parallel()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    heal: Heal = Heal()
    report: Report = Report()
    seed: int = 1
    """Of the initial weights, the data order and the dropout masks."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(name: str) -> Run:
    """The run of a preset's name, or of a TOML file's path. Raises UserError if it is neither or holds a wrong key."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, preset_names())
        raise UserError(f"no preset or file '{name}'.{hint}", f"Presets: {', '.join(preset_names())}.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}.") from error
    try:
        return settings.build(Run, values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_run(out: Path) -> Run:
    """The settings of the run in the folder `out`. Raises UserError if it is no run's folder."""
    if not (out / "run.toml").is_file():
        raise UserError(f"{out} is not a run's folder: it has no run.toml.", "megagpt train PRESET --out makes one.")
    return load(str(out / "run.toml"))


def to_toml(run: Run) -> str:
    """The whole tree as TOML; None is left out, since it is every such field's default. `load` reads it back equal."""
    return settings.to_toml(run)


def steps_of(run: Run) -> int:
    """Optimizer steps of the whole run: enough batches for train.tokens, or train.steps if that is fewer."""
    tokens = steps = 0
    ramp_end = run.train.ramp_tokens if run.train.ramp_start is not None else 0
    while tokens < min(ramp_end, run.train.tokens):
        tokens += run.train.batch_at(tokens) * run.model.context
        steps += 1
    batch_tokens = run.train.global_batch * run.model.context
    steps += max(0, -(-(run.train.tokens - tokens) // batch_tokens))
    return steps if run.train.steps is None else min(steps, run.train.steps)


def sequences_of(run: Run) -> int:
    """Sequences that the whole run reads."""
    sequences = 0
    for _ in range(steps_of(run)):
        sequences += run.train.batch_at(sequences * run.model.context)
    return sequences
