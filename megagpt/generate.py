"""Text from a model: the next token is drawn from its logits again and again, with a key-value cache.

The draws are a function of (seed, sample, step), as everything random here is, so that equal settings give equal
texts. The functions on logits are pure and come first; `generate` is the loop that uses them.

Letters: B samples, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import Model
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.model import GPT, KeyValueCache
from megagpt.philox import key_of, philox

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character, or not yet, decode to


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    tokens: int = 128
    """Most tokens of one sample; it also ends with the document, and where the model's context is full."""
    samples: int = 1
    """Texts from the same prompt."""
    temperature: float = 0.8
    """Divides the logits: below 1 more likely tokens gain, and 0 always takes the likeliest."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest tokens that together have this probability, from above 0 to 1."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text or prompt has already become less likely."""
    no_repeat_ngram: int = 0
    """No run of so many tokens occurs twice, the prompt included; 0: any may."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings."""
    seed: int = 1
    """Of the draws."""

    def check(self) -> None:
        """Raises UserError if a setting is out of its range."""
        for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("no_repeat_ngram", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} = {getattr(self, name)} must be at least {least}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1.")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty = {self.repetition_penalty} must be above 0.")
        if "" in self.stop:
            raise UserError("stop holds an empty string, which every text contains.")


@dataclass(frozen=True)
class Piece:
    """The next piece of one sample's text."""

    sample: int
    text: str


def penalise_repetition(logits_BV: Tensor, tokens_BS: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that occurred: over `penalty` if positive, else times it  (Keskar et al. 2019,
    arXiv:1909.05858).
    """
    seen = logits_BV.gather(1, tokens_BS)
    return logits_BV.scatter(1, tokens_BS, torch.where(seen > 0, seen / penalty, seen * penalty))


def forbid_repeated_ngrams(logits_BV: Tensor, tokens_BS: Tensor, n: int) -> Tensor:
    """-inf for every token that would repeat a run of n tokens, unless that is every token there is."""
    S = tokens_BS.shape[1]
    if n > S:
        return logits_BV
    runs_BRn = tokens_BS.unfold(1, n, 1)
    begun_BR = (runs_BRn[..., :-1] == tokens_BS[:, None, S - n + 1 :]).all(-1)
    times_BV = torch.zeros_like(logits_BV).scatter_add(1, runs_BRn[..., -1], begun_BR.to(logits_BV.dtype))
    forbidden_BV = (times_BV > 0) & (times_BV == 0).any(-1, keepdim=True)
    return logits_BV.masked_fill(forbidden_BV, -torch.inf)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits, and those equal to the k-th  (Fan et al. 2018, arXiv:1805.04833)."""
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest likeliest tokens with probability p together  (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = ordered_BV.softmax(-1)
    enough_BV = probability_BV.cumsum(-1) - probability_BV >= p  # before this token, so that the first one stays
    return logits_BV.scatter(1, order_BV, ordered_BV.masked_fill(enough_BV, -torch.inf))


def shape_logits(logits_BV: Tensor, tokens_BS: Tensor, options: Sampling) -> Tensor:
    """The logits that the next token is drawn from, in the order of the settings' effects."""
    if options.repetition_penalty != 1:
        logits_BV = penalise_repetition(logits_BV, tokens_BS, options.repetition_penalty)
    if options.no_repeat_ngram > 0:
        logits_BV = forbid_repeated_ngrams(logits_BV, tokens_BS, options.no_repeat_ngram)
    if options.temperature > 0:
        logits_BV = logits_BV / options.temperature
    if options.top_k > 0:
        logits_BV = keep_top_k(logits_BV, options.top_k)
    if options.top_p < 1:
        logits_BV = keep_top_p(logits_BV, options.top_p)
    return logits_BV


def draw(logits_BV: Tensor, *, seed: int, step: int) -> Tensor:
    """A token for each sample, int64 [B]: the first whose cumulative probability exceeds a number in [0, 1) that
    Philox gives to (seed, step, sample).
    """
    sample_B = torch.arange(len(logits_BV))
    zero = torch.zeros((), dtype=torch.int64)
    high_B, low_B, _, _ = philox((torch.tensor(step), sample_B, zero, zero), key_of(seed, "draw"))
    uniform_B = ((high_B << 20 | low_B >> 12).double() / 2**52).to(logits_BV.device)  # 52 bits are exact in fp64
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    chosen_B1 = torch.searchsorted(cumulative_BV, (uniform_B * cumulative_BV[:, -1])[:, None], right=True)
    return chosen_B1[:, 0]


@dataclass
class _Sample:
    """One text as it grows."""

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    ids: list[int]
    """Of the prompt and of what followed."""
    shown: int
    """Ids whose text is complete."""
    before: int = 0
    """Ids before these need not be decoded again."""
    held: str = ""
    """Text that may be the beginning of a stop string."""
    done: bool = False

    def push(self, token: int) -> str:
        """Take the next token; the text that can be shown now, which never ends inside a character."""
        if token == self.tokenizer.end_of_text:
            return self.finish()
        self.ids.append(token)
        text = self._undecoded()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return self._release(text)

    def finish(self) -> str:
        """End the text; what was held back."""
        self.done = True
        self.held, text = "", self.held + self._undecoded()
        return text

    def _undecoded(self) -> str:
        """The text after the ids that were shown; decoded with the ids before it, which may decide about a space."""
        known = self.tokenizer.decode(self.ids[self.before : self.shown])
        return self.tokenizer.decode(self.ids[self.before :])[len(known) :]

    def _release(self, text: str) -> str:
        text = self.held + text
        ends = [place for place in map(text.find, self.stop) if place >= 0]
        if ends:
            self.done, self.held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


@torch.inference_mode()
def generate(gpt: GPT, model: Model, tokenizer: Tokenizer, prompt: str, options: Sampling) -> Iterator[Piece]:
    """Continue `prompt`, piece by piece; the prompt itself is not repeated. An empty one begins a document.

    `gpt` is in eval mode, in any dtype, on any device. Raises UserError if the settings are out of range or the prompt
    leaves no room in the context, ValueError if the model is in training mode.
    """
    options.check()
    if gpt.training:
        raise ValueError("generate: the model is in training mode")
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    if len(ids) >= model.context:
        raise UserError(
            f"the prompt has {len(ids):,} tokens, and model.context = {model.context:,} leaves no room after it.",
            "Shorten the prompt.",
        )
    samples = [_Sample(tokenizer, options.stop, list(ids), len(ids)) for _ in range(options.samples)]
    for tokens in _chosen(gpt, model, ids, options, vocabulary=tokenizer.vocabulary):
        for index, (sample, token) in enumerate(zip(samples, tokens, strict=True)):
            if not sample.done and (text := sample.push(token)):
                yield Piece(index, text)
        if all(sample.done for sample in samples):
            return
    for index, sample in enumerate(samples):
        if not sample.done and (text := sample.finish()):
            yield Piece(index, text)


def _chosen(gpt: GPT, model: Model, prompt: list[int], options: Sampling, *, vocabulary: int) -> Iterator[list[int]]:
    """The next token of each sample, step by step; never one of the model's rows from `vocabulary` on."""
    weight = gpt.head.output.weight
    caches = [
        KeyValueCache(model, batch=options.samples, dtype=weight.dtype, device=weight.device) for _ in gpt.blocks
    ]
    tokens_BS = torch.tensor([prompt] * options.samples, device=weight.device)
    unread_BT = tokens_BS
    for step in range(min(options.tokens, model.context - len(prompt))):
        logits_BV = gpt.next_logits(unread_BT, caches)[:, :vocabulary].float()
        logits_BV = shape_logits(logits_BV, tokens_BS, options)
        greedy = options.temperature == 0
        chosen_B = logits_BV.argmax(-1) if greedy else draw(logits_BV, seed=options.seed, step=step)
        yield chosen_B.tolist()
        unread_BT = chosen_B[:, None]
        tokens_BS = torch.cat((tokens_BS, unread_BT), dim=1)


def complete(gpt: GPT, model: Model, tokenizer: Tokenizer, prompt: str, options: Sampling) -> list[str]:
    """The whole text of each sample, as `generate` yields it."""
    texts = [""] * options.samples
    for piece in generate(gpt, model, tokenizer, prompt, options):
        texts[piece.sample] += piece.text
    return texts
