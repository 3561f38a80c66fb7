"""megagpt through DeepSpeed: one rank, and so ZeRO 0, since there is nobody to share the optimizer's state with."""

from __future__ import annotations

import math
import sys

import torch
from _train_task import Task, read_task, serve
from torch import Tensor

from megagpt import config
from megagpt.data.batch import Batch
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine


def work(task: Task) -> None:
    """Serve from inside the rank."""
    model = config.Model(
        layers=task.layers, width=task.width, heads=task.heads, context=task.context, vocabulary=task.vocabulary
    )
    run = config.Run(
        model=model,
        parallel=config.Parallel(zero_stage=0),
        train=config.Train(global_batch=task.batch, micro_batch=task.batch, precision="fp32"),
        optim=config.Optim(
            lr=task.lr,
            weight_decay=task.weight_decay,
            beta1=task.betas[0],
            beta2=task.betas[1],
            clip_norm=task.clip_norm,
        ),
    )
    ranks.join(world=1)
    torch.set_num_threads(task.threads)
    engine = Engine(run, mesh_of(run.parallel, 0))
    samples_B = torch.arange(task.batch)

    def step(tokens: Tensor) -> float:
        batch = Batch(tokens[:, :-1], tokens[:, 1:], None, samples_B)
        return engine.train_batch([batch], lr=task.lr).loss

    parameters = sum(math.prod(shape) for shape in engine.shapes().values())
    serve(task, step, parameters=parameters, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    the_task = read_task()
    sys.exit(ranks.run_local(lambda: work(the_task), 1))
