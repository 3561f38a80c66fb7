from __future__ import annotations

from typing import Any

from megagpt.config import Optim, Parallel, Run, Train
from megagpt.parallel.zero import deepspeed_config

COMMON = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "train_batch_size": 24,
    "gradient_clipping": 0.0,  # the engine clips
    "steps_per_print": 2**62,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
}
BUCKETS = {
    "contiguous_gradients": True,
    "overlap_comm": False,
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
}


def of(zero_stage: int, precision: str, **parallel: Any) -> dict:
    return deepspeed_config(
        Run(
            train=Train(global_batch=24, micro_batch=4, precision=precision),  # type: ignore[arg-type]
            parallel=Parallel(data=2, zero_stage=zero_stage, **parallel),  # type: ignore[arg-type]
            optim=Optim(clip_norm=0.5),
        )
    )


def test_zero_0_in_fp32_is_plain():
    assert of(0, "fp32") == {**COMMON, "zero_optimization": {"stage": 0}}


def test_zero_1_and_2_accumulate_in_fp32():
    for stage in (1, 2):
        assert of(stage, "bf16") == {
            **COMMON,
            "zero_optimization": {"stage": stage, **BUCKETS},
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": True},
        }


def test_zero_3_in_fp16_scales_the_loss_dynamically():
    assert of(3, "fp16") == {
        **COMMON,
        "zero_optimization": {
            "stage": 3,
            **BUCKETS,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    }


def test_a_pipeline_sends_whole_activations_since_tensor_ranks_may_hold_their_own_tokens():
    assert of(0, "fp32", pipeline=2, tensor=2) == {
        **COMMON,
        "zero_optimization": {"stage": 0},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }


def test_an_optimizer_on_the_cpu_is_torchs_own():
    found = of(1, "fp32", offload=True)
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert found["zero_force_ds_cpu_optimizer"] is False
