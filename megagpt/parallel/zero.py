"""The DeepSpeed dictionary of a run: one pure function, so that no user ever writes one.

What it leaves out matters as much: no optimizer (engine.py hands DeepSpeed torch's AdamW, so nothing is compiled), no
scheduler (the rate is set each step), no clipping (engine.py clips, by a norm that is the same on every layout), and
batch sizes only as DeepSpeed's own checks want them (whole.py marks the accumulation boundary itself, so that batches
can grow during a run).
"""

from __future__ import annotations

from typing import Any

from megagpt.config import Run


def deepspeed_config(run: Run) -> dict[str, Any]:
    """DeepSpeed's configuration of `run`. Units: buckets in elements.

    Gradients accumulate in fp32 wherever DeepSpeed can (ZeRO 1-3); ZeRO 0 keeps them in the weights' precision.
    """
    parallel, train = run.parallel, run.train
    accumulation = train.global_batch // (train.micro_batch * parallel.data)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": train.micro_batch * parallel.data * accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": parallel.zero_stage},
    }
    if parallel.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["zero_optimization"] |= {
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        }
    if parallel.zero_stage == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
        }
    if parallel.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False
    if parallel.pipeline > 1:
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if train.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return config
