"""Hugging Face's Trainer with its GPT2LMHeadModel, its own loop from the first step to the last."""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import islice
from typing import Any

import torch
from _train_task import Channel, Task, read_task, rows, versions
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Rounds(TrainerCallback):
    """Stops the clock of the Trainer between rounds."""

    def __init__(self, task: Task, parameters: int) -> None:
        self.task, self.parameters, self.channel = task, parameters, Channel()
        self.begin = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        done = state.global_step - self.task.warmup
        if done == 0:
            said = {"parameters": self.parameters, "versions": versions("torch", "transformers", "accelerate")}
            self.channel.tell(said)
        if done >= 0 and done % self.task.steps == 0:
            if not self.channel.asked():
                sys.exit()
            self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.seconds = time.perf_counter() - self.begin

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if state.global_step > self.task.warmup and logs and "loss" in logs:
            self.channel.tell({"seconds": self.seconds, "loss": float(logs["loss"])})


def main() -> None:
    task = read_task()
    torch.manual_seed(1)
    sizes = GPT2Config(
        vocab_size=task.vocabulary,
        n_positions=task.context,
        n_embd=task.width,
        n_layer=task.layers,
        n_head=task.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(sizes)
    batches = list(islice(rows(task), 64))
    data = [
        {"input_ids": row[:-1], "labels": row[:-1]} for batch in batches for row in batch
    ]  # it shifts labels itself
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task.batch,
            max_steps=1_000_000,
            learning_rate=task.lr,
            lr_scheduler_type="constant",
            weight_decay=task.weight_decay,
            adam_beta1=task.betas[0],
            adam_beta2=task.betas[1],
            max_grad_norm=task.clip_norm,
            logging_steps=task.steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        rounds = Rounds(task, sum(parameter.numel() for parameter in model.parameters()))
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[rounds]).train()  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
