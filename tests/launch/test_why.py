from __future__ import annotations

from megagpt.launch.why import first_cause
from megagpt.outcome import Outcome

NCCL = """2026-03-01 10:00:{second},100 INFO step 41
[rank{rank}]:[E301 10:00:{late}.512 ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout
Traceback (most recent call last):
torch.distributed.DistBackendError: NCCL communicator was aborted. Original reason: remote process exited
"""
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.3]:41712\n"


def peers(*ranks: int) -> dict[str, str]:
    return {f"rank-{rank}.log": NCCL.format(rank=rank, second="01", late="02") for rank in ranks}


def test_a_rank_out_of_memory_is_the_cause_though_all_others_complained_first():
    logs = peers(0, 1, 2)
    own = "2026-03-01 10:00:05,000 INFO step 41\ntorch.OutOfMemoryError: CUDA out of memory.\n"
    found = first_cause([], {**logs, "rank-3.log": own})
    assert found is not None
    assert (found.rank, found.cause, found.source) == (3, "out_of_memory", "rank-3.log, line 2")


def test_of_two_own_errors_the_earlier_clock_is_the_cause():
    logs = {
        "rank-0.log": "10:00:09 step\nValueError: late\n",
        "rank-1.log": "10:00:07 step\nValueError: early\n",
        **peers(2),
    }
    found = first_cause([], logs)
    assert found is not None
    assert (found.rank, found.message) == (1, "ValueError: early")


def test_a_killed_rank_that_said_nothing_is_found_by_its_peers_and_by_srun():
    logs = {**peers(0, 2), "rank-1.log": "2026-03-01 10:00:01,000 INFO step 41\n"}
    found = first_cause([], logs)
    assert found is not None
    assert (found.rank, found.cause) == (1, "rank_lost")
    srun = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated\n"
    found = first_cause([], {**peers(0, 2), "slurm-7.out": srun})
    assert found is not None
    assert (found.rank, found.host, found.cause) == (1, "n2", "rank_lost")


def test_a_ranks_own_error_is_nearer_than_the_tasks_that_srun_killed_for_it():
    srun = "srun: error: n2: task 5: Killed\n"
    found = first_cause([], {"rank-4.log": "RuntimeError: CUBLAS_STATUS_EXECUTION_FAILED\n", "slurm-7.out": srun})
    assert found is not None
    assert (found.rank, found.cause) == (4, "error")


def test_a_lost_node_is_named():
    found = first_cause([], {"rank-0.log": GLOO, "slurm-1.out": "srun: error: Node failure on n3\n"})
    assert found is not None
    assert (found.host, found.cause, found.rank) == ("n3", "node", None)


def test_what_a_rank_wrote_down_itself_counts_before_any_log():
    words = [
        Outcome(result="failed", cause="peer_lost", message="reset", rank=0, host="n1", time=1.0),
        Outcome(result="failed", cause="disk_full", message="no space", rank=2, host="n2", time=2.0),
    ]
    found = first_cause(words, {"rank-1.log": "ValueError: x\n"})
    assert found is not None
    assert (found.rank, found.host, found.cause) == (2, "n2", "disk_full")


def test_a_users_mistake_is_quoted_and_a_warning_is_not():
    logs = {"rank-0.log": "megagpt: warning: slow\nmegagpt: optim.lr = -1 must be above 0.\n"}
    found = first_cause([], logs)
    assert found is not None
    assert (found.cause, found.message) == ("user", "megagpt: optim.lr = -1 must be above 0.")


def test_a_run_that_is_done_has_no_cause_whatever_its_logs_say():
    assert first_cause([Outcome(result="finished", cause="done", rank=0)], peers(0, 1)) is None
    assert first_cause([], {"rank-0.log": "step 1 loss 3.2\n"}) is None
