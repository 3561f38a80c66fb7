"""LitGPT's model and loss, in the loop of _train_pytorch.py.

The nearest that its configuration comes to GPT-2: rotary positions on a quarter of each head instead of learned ones.
Its head is not tied to the embedding; it is tied here, so that the optimizer has the same work.
"""

from __future__ import annotations

import torch
from _train_pytorch import adamw
from _train_task import read_task, serve
from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]
from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]
from torch import Tensor


def main() -> None:
    task = read_task()
    sizes = Config(
        block_size=task.context,
        vocab_size=task.vocabulary,
        padded_vocab_size=task.vocabulary,
        n_layer=task.layers,
        n_head=task.heads,
        n_embd=task.width,
        rotary_percentage=0.25,
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )
    torch.manual_seed(1)
    model = GPT(sizes)
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    optimizer = adamw(model, task)

    def step(tokens: Tensor) -> float:
        loss = chunked_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], chunk_size=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve(task, step, parameters=sum(one.numel() for one in model.parameters()), packages=("torch", "litgpt"))


if __name__ == "__main__":
    main()
