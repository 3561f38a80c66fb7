"""The loss on held-out documents: nats a token, perplexity, and bits a byte, which compare across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagpt.config import Data
from megagpt.data.batch import IGNORE, Batch
from megagpt.data.corpus import Corpus
from megagpt.data.loader import heldout_batches
from megagpt.data.pack import open_sequences
from megagpt.data.tokenizer import token_byte_lengths
from megagpt.parallel.ranks import sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on `sequences` held-out sequences of one corpus."""

    corpus: str
    loss: float
    """Mean over the target tokens, in nats."""
    perplexity: float
    bits_per_byte: float
    """Sum of the losses in bits, over the bytes that the target tokens stand for."""
    sequences: int
    tokens: int
    bytes: int
    """Of the text that the target tokens stand for."""


def evaluate_corpus(
    loss_sum: Callable[[Batch], Tensor],
    corpus: Corpus,
    *,
    sequences: int,
    context: int,
    micro_batch: int,
    data: Data,
    data_rank: int = 0,
    data_ranks: int = 1,
    counts: bool = True,
    reads: bool = True,
) -> Evaluation:
    """Evaluate a model on the held-out split. `loss_sum` gives the sum of a micro-batch's losses (nats) on this rank.

    Every data-parallel rank computes its part of the same sequences, in equally many micro-batches, and gets the same
    answer. Of the ranks that share a replica one `counts`, and those of its middle stages read nothing. Raises
    UserError if the corpus has no held-out documents.
    """
    available = open_sequences(corpus, "heldout", context=context, packing=data.packing).count
    batches = heldout_batches(
        corpus,
        context=context,
        sequences=sequences,
        micro_batch=micro_batch,
        data_rank=data_rank,
        data_ranks=data_ranks,
        packing=data.packing,
        document_mask=data.document_mask,
        reads=reads,
    )
    sums = _sums(loss_sum, batches, token_byte_lengths(corpus.tokenizer()))
    nats, tokens, size = sum_over_ranks(sums if counts else [0.0] * len(sums))
    loss = nats / tokens
    return Evaluation(
        corpus=corpus.name,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / size,
        sequences=min(sequences, available),
        tokens=int(tokens),
        bytes=int(size),
    )


def _sums(loss_sum: Callable[[Batch], Tensor], batches: Iterable[Batch], token_bytes: np.ndarray) -> list[float]:
    """Sum of losses (nats), number of target tokens, and bytes that they stand for, on this rank."""
    nats, tokens, size = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            targets = batch.targets_BT[batch.targets_BT != IGNORE].numpy()
            nats += float(loss_sum(batch))
            tokens += targets.size
            size += int(token_bytes[targets].sum())
    return [nats, float(tokens), float(size)]
