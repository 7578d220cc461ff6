# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens against transformers' own processors, and text that comes piece by piece."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt_fast.serving.requests import RequestError, Sampling
from softprompt_fast.serving.sampler import RowSampler, choose
from softprompt_fast.serving.text import TextStream
from tests.device import randn, seeded
from tests.serving import make_tokenizer

VOCAB = 3000

RULES = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_k": 5},
    {"top_k": 100, "top_p": 0.8},
    {"top_k": 1500, "top_p": 0.9},
    {"top_k": VOCAB + 5},
    {"min_p": 0.2},
    {"min_p": 0.05, "top_p": 0.9, "top_k": 40},
    {"top_p": 1e-6},
]


def warped(logits: torch.Tensor, rules: dict[str, float]) -> torch.Tensor:
    """transformers' probabilities ``[V]``."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(rules.get("temperature", 1.0))])
    if "top_k" in rules:
        warpers.append(TopKLogitsWarper(int(rules["top_k"])))
    if "top_p" in rules:
        warpers.append(TopPLogitsWarper(rules["top_p"]))
    if "min_p" in rules:
        warpers.append(MinPLogitsWarper(rules["min_p"]))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_draws_have_the_probabilities_that_transformers_gives(rules):
    logits = randn((VOCAB,), generator=seeded(0)) * 2
    expected = warped(logits, rules)
    rows, rounds = 250, 40
    samplers = [RowSampler(Sampling(**({"temperature": 1.0} | rules), seed=i), [], VOCAB) for i in range(rows)]
    drawn = Counter(c.token for _ in range(rounds) for c in choose(logits.expand(rows, -1), samplers))
    assert all(expected[token] > 0 for token in drawn), "a token was drawn that transformers has removed"
    # Pearson's statistic over the most probable tokens and the rest of them together; its 1e-6 quantile.
    total = rows * rounds
    top = expected.topk(min(20, int((expected > 0).sum())))
    counts = [(drawn[int(i)], float(p) * total) for p, i in zip(*top, strict=True)]
    counts.append((total - sum(n for n, _ in counts), total - sum(e for _, e in counts)))
    statistic = sum((n - e) ** 2 / max(e, 1.0) for n, e in counts)
    assert statistic < len(counts) + 5 * math.sqrt(2 * len(counts)) + 20


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-40, "top_k": 5},
        {"temperature": 1e-38, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 100.0, "top_p": 1e-300, "top_k": 10**30},
    ],
    ids=str,
)
def test_rules_that_leave_one_token(rules):
    """Too small for float32: a temperature of 0 would give NaN, and nothing is less than a `top_p` of 0."""
    logits = 100 * randn((4, VOCAB), generator=seeded(6))
    found = choose(logits, [RowSampler(Sampling(**rules, seed=i), [], VOCAB) for i in range(4)])
    assert [choice.token for choice in found] == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_whatever_stands_beside_it():
    generator = seeded(1)
    logits = randn((8, VOCAB), generator=generator)
    rules = [{"temperature": 1.0} | RULES[i % len(RULES)] for i in range(8)]
    together = [RowSampler(Sampling(**rule, seed=i), [], VOCAB) for i, rule in enumerate(rules)]
    apart = [RowSampler(Sampling(**rule, seed=i), [], VOCAB) for i, rule in enumerate(rules)]
    for _ in range(20):
        expected = [choose(logits[i : i + 1], [sampler])[0].token for i, sampler in enumerate(apart)]
        assert [c.token for c in choose(logits, together)] == expected


def test_penalties_and_biases():
    generator = seeded(2)
    given = [3, 5, 5, 9]
    logits = randn((VOCAB,), generator=generator)
    rules = {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {7: 2.5}}
    sampler = RowSampler(Sampling(**rules), given, VOCAB)
    new = [11, 12, 11]
    for token in new:
        sampler.accept(token)
    found = logits.clone()
    sampler.adjust(found)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([given + new]), logits[None].clone())[0]
    for token, times in Counter(new).items():
        expected[token] -= 0.4 + 0.3 * times
    expected[7] += 2.5
    torch.testing.assert_close(found, expected)


def test_greedy_rows_beside_penalised_ones_keep_their_logits():
    logits = randn((2, VOCAB), generator=seeded(3))
    best = logits.argmax(-1).tolist()
    rows = [RowSampler(Sampling(), [], VOCAB), RowSampler(Sampling(logit_bias={best[1]: -100.0}), [], VOCAB)]
    found = [choice.token for choice in choose(logits, rows)]
    assert found[0] == best[0] and found[1] != best[1]


def test_logprobs_are_the_models_own():
    logits = randn((2, VOCAB), generator=seeded(4))
    rows = [RowSampler(Sampling(logprobs=3, temperature=0.2, seed=0), [], VOCAB), RowSampler(Sampling(), [], VOCAB)]
    with_logprobs, without = choose(logits, rows)
    expected = logits[0].log_softmax(-1)
    assert without.logprobs is None and with_logprobs.logprobs is not None
    assert with_logprobs.logprobs.logprob == pytest.approx(float(expected[with_logprobs.token]), rel=1e-5)
    values, ids = expected.topk(3)
    assert [token for token, _ in with_logprobs.logprobs.top] == ids.tolist()
    assert [value for _, value in with_logprobs.logprobs.top] == pytest.approx(values.tolist(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_own_row(bad):
    logits = randn((2, VOCAB), generator=seeded(5))
    logits[0, 17] = bad
    rows = [RowSampler(Sampling(temperature=1.0), [], VOCAB), RowSampler(Sampling(temperature=1.0), [], VOCAB)]
    found = choose(logits, rows)
    assert found[0].token is None and found[1].token is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"max_tokens": 0},
        {"presence_penalty": 3.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"logprobs": 21},
        {"stop": ("",)},
        {"stop": ("x",) * 1000},
        {"stop": ("x" * 1000,)},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 1e300}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_text_equals_the_whole_whatever_the_pieces():
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    decode = tokenizer.backend_tokenizer.decode
    whole_characters = 0
    for _ in range(300):
        tokens = [rng.randrange(2, 40) for _ in range(rng.randrange(1, 30))]
        if rng.random() < 0.7:  # whole four-byte characters in between, which random bytes rarely are
            tokens += tokenizer("a😀ä b😀")["input_ids"]
        stream = TextStream(decode)
        pieces = [stream.push(token) for token in tokens]
        whole_characters += any("😀" in piece for piece in pieces)
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + stream.finish() == decode(tokens)
    assert whole_characters > 100


def test_a_character_begun_by_the_given_tokens_is_completed():
    tokenizer = make_tokenizer()
    ids = tokenizer("x😀y")["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer.decode, ids[:3])
    assert [stream.push(token) for token in ids[3:]] == ["", "😀", "y"]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "by"),
    [
        ("abcdef", ("cd",), "ab", "cd"),
        ("abcdef", ("de", "cd"), "ab", "cd"),
        ("aaab", ("aab",), "a", "aab"),
        ("abcabd", ("abd",), "abc", "abd"),
        ("abcab", ("abd",), "abcab", None),
        ("a ä", (" ä",), "a", " ä"),
        ("abcd", ("bc", "bcd"), "a", "bc"),
    ],
)
def test_stop_strings_that_straddle_tokens(text, stop, expected, by):
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer.backend_tokenizer.decode, stop=stop)
    shown = ""
    for token in tokenizer(text)["input_ids"]:
        shown += stream.push(token)
        assert expected.startswith(shown), "text was shown that belongs to a stop string"
        if stream.stopped is not None:
            break
    assert shown + stream.finish() == expected
    assert stream.stopped == by
