"""Generation: the cache against the whole model, the logits' functions against transformers, and where texts end."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagpt import generate as module
from megagpt.config import Model
from megagpt.data.tokenizer import train_tokenizer
from megagpt.errors import UserError
from megagpt.generate import Piece, Sampling, complete, generate
from megagpt.model import KeyValueCache, build, initialise

torch.set_num_threads(1)

DENSE = Model(layers=3, width=32, heads=4, vocabulary=300, context=20, init_std=0.2)
MODERN = dataclasses.replace(
    DENSE,
    kv_heads=2,
    norm="rmsnorm",
    positions="rotary",
    feed_forward="swiglu",
    biases="none",
    qk_norm=True,
    tied=False,
)
MODELS = {
    "dense": DENSE,
    "banded": dataclasses.replace(DENSE, window=4, biases="no_qkv", dropout=0.3),
    "modern": MODERN,
    "modern-banded": dataclasses.replace(MODERN, window=4, qk_norm=False),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, a few merges and the end of text, which is token 0: 269 in all, fewer than the models have rows."""
    return train_tokenizer(["the cat sat on the mat"] * 9, 270)


def small(model, recompute: Any = "none"):
    gpt = build(model, recompute=recompute)
    initialise(gpt, model, seed=1)
    return gpt.eval()


def caches_of(model, batch, dtype=torch.float64):
    return [KeyValueCache(model, batch=batch, dtype=dtype, device=torch.device("cpu")) for _ in range(model.layers)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 5, 1, 5], [20]], ids=["single", "mixed", "whole"])
def test_cached_logits_are_those_of_the_whole_text(name, cuts):
    gpt = small(MODELS[name]).double()
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    whole, caches, end = gpt.logits(tokens), caches_of(MODELS[name], 2), 0
    for part in tokens.split(cuts, dim=1):
        end += part.shape[1]
        torch.testing.assert_close(gpt.next_logits(part, caches), whole[:, end - 1])


def test_a_cache_takes_no_more_than_the_context():
    gpt, caches = small(DENSE), caches_of(DENSE, 1, torch.float32)
    gpt.next_logits(torch.zeros(1, 20, dtype=torch.int64), caches)
    with pytest.raises(ValueError, match="21 tokens are more than the cache's 20"):
        caches[0].append(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_likeliest_token_each_time(name, tokenizer):
    model, gpt = MODELS[name], small(MODELS[name], recompute="full")
    ids = tokenizer.encode("the cat")
    text = complete(gpt, model, tokenizer, "the cat", Sampling(temperature=0, tokens=9))
    with torch.no_grad():
        for _ in range(9):
            ids.append(int(gpt.logits(torch.tensor([ids]))[0, -1, :269].argmax()))
            if ids[-1] == tokenizer.end_of_text:
                ids.pop()
                break
    assert text == [tokenizer.decode(ids)[len("the cat") :]]


@pytest.mark.parametrize(
    ("ours", "theirs", "argument"),
    [
        ("penalise_repetition", "RepetitionPenaltyLogitsProcessor", 1.3),
        ("forbid_repeated_ngrams", "NoRepeatNGramLogitsProcessor", 1),
        ("forbid_repeated_ngrams", "NoRepeatNGramLogitsProcessor", 3),
        ("forbid_repeated_ngrams", "NoRepeatNGramLogitsProcessor", 50),
        ("keep_top_k", "TopKLogitsWarper", 5),
        ("keep_top_k", "TopKLogitsWarper", 500),
        ("keep_top_p", "TopPLogitsWarper", 0.7),
        ("keep_top_p", "TopPLogitsWarper", 0.01),
    ],
)
def test_what_shapes_the_logits_does_what_transformers_does(ours, theirs, argument):
    import transformers

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 4, (3, 40), generator=generator)
    logits = torch.randn(3, 20, generator=generator) * 2
    needs_tokens = ours in ("penalise_repetition", "forbid_repeated_ngrams")
    mine = getattr(module, ours)(logits, *([tokens] if needs_tokens else []), argument)
    assert torch.equal(mine, getattr(transformers, theirs)(argument)(tokens, logits))


def test_where_every_token_would_repeat_a_run_none_is_forbidden():
    logits, tokens = torch.randn(2, 4), torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]])
    kept = module.forbid_repeated_ngrams(logits, tokens, 1)
    assert torch.equal(kept[0], logits[0])
    assert kept[1].isneginf().tolist() == [True, True, False, False]


def test_draws_follow_the_probabilities_and_never_take_what_has_none():
    logits = torch.tensor([[-torch.inf, 0.1, 0.2, -torch.inf, 0.7, -torch.inf]]).log()
    logits[0, [0, 3, 5]] = -torch.inf
    counts = torch.zeros(6)
    for step in range(400):
        counts += torch.bincount(module.draw(logits.expand(25, 6), seed=3, step=step), minlength=6)
    assert counts.sum() == 10_000
    assert counts[[0, 3, 5]].sum() == 0
    assert (counts[[1, 2, 4]] / 10_000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)


@pytest.mark.parametrize(("word", "token"), [(0, 1), (2**32 - 1, 4)], ids=["lowest", "highest"])
def test_even_the_extreme_draws_take_a_token_that_has_a_probability(word, token, monkeypatch):
    monkeypatch.setattr(module, "philox", lambda _counter, _key: (torch.tensor([word]),) * 4)
    logits = torch.tensor([[-torch.inf, 0.0, 3.0, 1.0, -2.0, -torch.inf]])
    assert module.draw(logits, seed=1, step=0).tolist() == [token]


def test_a_draw_depends_on_seed_step_and_sample():
    flat = torch.zeros(3, 1 << 20)
    draws = [module.draw(flat, seed=seed, step=step).tolist() for seed, step in ((1, 0), (1, 1), (2, 0))]
    assert len({token for row in draws for token in row}) == 9
    assert module.draw(flat[:1], seed=1, step=0).tolist() == draws[0][:1]


def test_rows_of_the_vocabulary_that_are_no_token_are_never_chosen(tokenizer):
    pieces = scripted(tokenizer, [*tokenizer.encode("a"), 299, *tokenizer.encode("b")])
    assert text_of(pieces) == "a"  # at a step where only 299 is wanted, the first of equals is the end of text


def test_a_sample_is_the_same_however_many_there_are_and_the_seed_changes_it(tokenizer):
    gpt = small(DENSE)
    one, *others = complete(gpt, DENSE, tokenizer, "the", Sampling(samples=3, tokens=12))
    assert complete(gpt, DENSE, tokenizer, "the", Sampling(samples=1, tokens=12)) == [one]
    assert one not in others
    assert complete(gpt, DENSE, tokenizer, "the", Sampling(samples=1, tokens=12, seed=2)) != [one]


class Scripted:
    """Stands in for a GPT: the logits of step i want the i-th token of each sample's script."""

    training = False
    blocks = ()
    head = SimpleNamespace(output=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, *scripts):
        self.steps = iter(zip(*scripts, strict=True))

    def next_logits(self, *_tokens_and_caches):
        return torch.nn.functional.one_hot(torch.tensor(next(self.steps)), 400).float()


def scripted(tokenizer, *texts, tokens=99, context=999, **options) -> list[Piece]:
    scripts = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    longest = max(map(len, scripts))
    gpt: Any = Scripted(*(script + [tokenizer.end_of_text] * (longest + 1 - len(script)) for script in scripts))
    sampling = Sampling(temperature=0, samples=len(texts), tokens=tokens, **options)
    return list(generate(gpt, dataclasses.replace(DENSE, context=context), tokenizer, "the", sampling))


def text_of(pieces, sample=0):
    return "".join(piece.text for piece in pieces if piece.sample == sample)


def test_pieces_never_end_inside_a_character(tokenizer):
    text = "é🙂 cat 漢字"
    pieces = scripted(tokenizer, text)
    assert text_of(pieces) == text
    assert [piece.text for piece in pieces][:3] == ["é", "🙂", " cat"]


def test_bytes_that_are_no_character_are_shown_as_such_at_the_latest_at_the_end(tokenizer):
    first_byte_of_two = tokenizer.encode("é")[0]
    assert text_of(scripted(tokenizer, [first_byte_of_two, *tokenizer.encode("a"), first_byte_of_two])) == "�a�"


def test_a_text_ends_with_its_document_and_the_others_go_on(tokenizer):
    pieces = scripted(tokenizer, "cat", "the mat on the mat", "")
    assert [text_of(pieces, sample) for sample in range(3)] == ["cat", "the mat on the mat", ""]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("the cat sat", ("sat",), "the cat "),
        ("the cat sat", ("x", "at s"), "the c"),
        ("the cat sat", ("cat", "e c"), "th"),
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("the cat", ("cats",), "the cat"),
        ("x\n\n", ("\n\n",), "x"),
        ("é🙂é", ("🙂",), "é"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(tokenizer, text, stop, shown):
    pieces = scripted(tokenizer, text, stop=stop)
    assert text_of(pieces) == shown


def test_a_text_ends_after_its_tokens_and_at_the_end_of_the_context(tokenizer):
    prompt = len(tokenizer.encode("the"))
    assert text_of(scripted(tokenizer, "zyxwvu", tokens=4)) == "zyxw"
    assert text_of(scripted(tokenizer, "zyxwvu", context=prompt + 3)) == "zyx"


def test_the_whole_context_can_be_used(tokenizer):
    gpt = small(DENSE)
    (text,) = complete(gpt, DENSE, tokenizer, "the", Sampling(temperature=0, tokens=10_000))
    assert text


def test_an_empty_prompt_begins_a_document(tokenizer):
    gpt = small(DENSE)
    first = int(gpt.logits(torch.tensor([[tokenizer.end_of_text]]))[0, -1, :269].argmax())
    assert complete(gpt, DENSE, tokenizer, "", Sampling(temperature=0, tokens=1)) == [tokenizer.decode([first])]


def test_a_prompt_as_long_as_the_context_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"the prompt has 20 tokens, and model\.context = 20"):
        complete(small(DENSE), DENSE, tokenizer, "x" * 20, Sampling())


def test_a_model_in_training_mode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="training mode"):
        complete(small(DENSE).train(), DENSE, tokenizer, "the", Sampling())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 0}, "tokens = 0 must be at least 1"),
        ({"samples": 0}, "samples = 0 must be at least 1"),
        ({"temperature": -0.5}, "temperature = -0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature = nan must be at least 0"),
        ({"top_k": -1}, "top_k = -1 must be at least 0"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be above 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram = -1 must be at least 0"),
        ({"stop": ("a", "")}, "stop holds an empty string"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(options, words, tokenizer):
    with pytest.raises(UserError) as caught:
        complete(small(DENSE), DENSE, tokenizer, "the", Sampling(**options))
    assert words in str(caught.value)


def test_settings_act_together_in_their_order(tokenizer):
    options = Sampling(samples=2, tokens=16, top_k=20, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram=2, seed=5)
    gpt = small(DENSE)
    tokens: list[list[int]] = [tokenizer.encode("the")] * 2
    for step in range(16):
        before = torch.tensor(tokens)
        with torch.no_grad():
            logits = module.penalise_repetition(gpt.logits(before)[:, -1, :269], before, 1.2)
        logits = module.forbid_repeated_ngrams(logits, before, 2) / 0.8
        logits = module.keep_top_p(module.keep_top_k(logits, 20), 0.9)
        tokens = [
            [*row, int(token)] for row, token in zip(tokens, module.draw(logits, seed=5, step=step), strict=True)
        ]
    wanted = [row[len(tokenizer.encode("the")) :] for row in tokens]
    wanted = [row[: row.index(0)] if 0 in row else row for row in wanted]
    assert complete(gpt, DENSE, tokenizer, "the", options) == [tokenizer.decode(row) for row in wanted]
