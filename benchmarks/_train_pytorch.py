"""A minimal GPT-2 in plain PyTorch and the shortest loop that trains it, in the manner of nanoGPT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _train_task import Task, read_task, serve
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.heads = task.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(task.width), nn.LayerNorm(task.width)
        self.qkv, self.out = nn.Linear(task.width, 3 * task.width), nn.Linear(task.width, task.width)
        self.up, self.down = nn.Linear(task.width, 4 * task.width), nn.Linear(4 * task.width, task.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Learned positions, tied embeddings."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(task.vocabulary, task.width), nn.Embedding(task.context, task.width)
        self.blocks = nn.Sequential(*(Block(task) for _ in range(task.layers)))
        self.norm = nn.LayerNorm(task.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * task.layers) if residual else 1))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.token(inputs) + self.position.weight
        logits = F.linear(self.norm(self.blocks(x)), self.token.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def adamw(model: nn.Module, task: Task) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, in torch's fastest implementation."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=task.lr, betas=task.betas, fused=True)


def main() -> None:
    task = read_task()
    model = GPT2(task)
    optimizer = adamw(model, task)

    def step(tokens: Tensor) -> float:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve(task, step, parameters=sum(one.numel() for one in model.parameters()), packages=("torch",))


if __name__ == "__main__":
    main()
