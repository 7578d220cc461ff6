# SPDX-License-Identifier: Apache-2.0
"""The loss functions against transformers' own loss over whole sequences, virtual tokens included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from softprompt_fast.backends import heuristics
from softprompt_fast.losses import (
    IGNORE,
    causal_lm_terms,
    repeated_cross_entropy,
    split_labels,
    summed_cross_entropy,
    visible_labels,
    weighted_sum,
)

VOCAB = 11


def causal_lm_loss(
    logits: Tensor, labels: Tensor, start: Tensor | None, num_items: Tensor | int | None = None
) -> Tensor:
    """The loss from logits ``[B, 1 + S, V]``, the first of each row being what its prefix, one a row, predicts."""
    terms = causal_lm_terms(labels, start, torch.arange(len(labels)), [True] * len(labels))
    own = weighted_sum(logits[:, 1:].flatten(0, 1)[terms.positions], terms.labels, terms.weights)
    return terms.loss(own, logits[:, 0].unbind(), num_items=num_items)


def test_unpadded_rows_give_transformers_loss() -> None:
    logits, labels = torch.randn(3, 6, VOCAB), torch.randint(0, VOCAB, (3, 5))
    labels[0, :2], labels[1, 3], labels[2, 4] = IGNORE, IGNORE, IGNORE
    whole = torch.cat([torch.full((3, 1), IGNORE), labels], dim=1)
    expected = ForCausalLMLoss(logits, whole, VOCAB)
    torch.testing.assert_close(causal_lm_loss(logits, labels, None), expected)
    by_items = ForCausalLMLoss(logits, whole, VOCAB, num_items_in_batch=torch.tensor(40))
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(causal_lm_loss(logits, labels, None, items), by_items)


def test_padded_rows_give_the_mean_over_rows_alone() -> None:
    start, end = torch.tensor([2, 0, 3]), torch.tensor([5, 4, 3])  # the last row has no own token
    logits, labels = torch.randn(3, 6, VOCAB), torch.randint(0, VOCAB, (3, 5))
    visible = visible_labels(labels, start, end)
    assert (visible != IGNORE).sum(dim=1).tolist() == [3, 4, 0]
    found = causal_lm_loss(logits, visible, start)
    total = torch.zeros(())
    for row in range(2):
        a, b = start[row], end[row]
        predicting = torch.cat([logits[row, :1], logits[row, 1 + a : b]])
        total = total + cross_entropy(predicting, labels[row, a:b], reduction="sum")
    torch.testing.assert_close(found, total / 7)


def test_visible_labels() -> None:
    labels = torch.arange(8).view(2, 4)
    assert visible_labels(labels, None, None) is labels
    found = visible_labels(labels, torch.tensor([1, 0]), None)
    assert found.tolist() == [[IGNORE, 1, 2, 3], [4, 5, 6, 7]]
    found = visible_labels(labels, None, torch.tensor([4, 1]))
    assert found.tolist() == [[0, 1, 2, 3], [4, IGNORE, IGNORE, IGNORE]]


def test_split_labels() -> None:
    labels = torch.tensor([[7, 8, 9], [IGNORE, 5, 6], [IGNORE, IGNORE, IGNORE]])
    shifted, first = split_labels(labels, torch.tensor([0, 1, 3]))
    assert first.tolist() == [7, 5, IGNORE]
    # Nothing in a row's padding predicts its first token.
    assert shifted.tolist() == [[8, 9, IGNORE], [IGNORE, 6, IGNORE], [IGNORE] * 3]
    shifted, first = split_labels(labels, None)
    assert first.tolist() == [7, IGNORE, IGNORE] and shifted[1].tolist() == [5, 6, IGNORE]
    shifted, first = split_labels(torch.empty(2, 0, dtype=torch.long), None)
    assert shifted.shape == (2, 0) and first.tolist() == [IGNORE, IGNORE]


def test_terms_of_prefixes_that_do_and_do_not_predict() -> None:
    labels = torch.tensor([[7, 8, 9], [IGNORE, 5, 6], [1, 2, IGNORE], [3, IGNORE, IGNORE]])
    terms = causal_lm_terms(labels, None, torch.tensor([1, 1, 0, -1]), [False, True])
    assert terms.positions.tolist() == [0, 1, 3, 4, 6] and terms.labels.tolist() == [8, 9, 5, 6, 2]
    assert [part.labels.tolist() for part in terms.prefixes] == [[], [7]] and terms.count == 6


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_nothing_labelled_is_zero_with_a_zero_gradient(items: Tensor | int | None) -> None:
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, 4), IGNORE), None, items)
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(256, VOCAB).to(dtype), torch.randint(0, VOCAB, (256,))
    expected = cross_entropy(logits.float(), labels, reduction="sum")
    for found in (weighted_sum(logits, labels), summed_cross_entropy(torch.clone, logits, labels, vocab_size=VOCAB)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    assert weighted_sum(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("rows", [0, 1, 7, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_give_the_sum_and_the_gradient_of_the_whole(
    rows: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "head_rows", lambda rows, vocab_size: 3)
    hidden, weight = torch.randn(rows, 8, dtype=torch.float64), torch.randn(VOCAB, 8, dtype=torch.float64)
    labels, weights = torch.randint(0, VOCAB, (rows,)), torch.rand(rows) if weighted else None
    seen: list[int] = []

    def head(states: Tensor) -> Tensor:  # with a soft cap, which is no linear map
        seen.append(len(states))
        return 3 * torch.tanh(states @ weight.T / 3)

    def run(whole: bool) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        if whole:
            total = weighted_sum(head(leaf), labels, weights)
        else:
            total = summed_cross_entropy(head, leaf, labels, weights, vocab_size=VOCAB)
        (total * 0.5).backward()
        return total.detach(), leaf.grad

    expected = run(whole=True)
    seen.clear()
    torch.testing.assert_close(run(whole=False), expected)
    assert sum(seen) == rows and max(seen, default=0) <= 3
    torch.testing.assert_close(summed_cross_entropy(head, hidden, labels, weights, vocab_size=VOCAB), expected[0])


def test_chunks_are_once_differentiable() -> None:
    hidden = torch.randn(4, VOCAB, requires_grad=True)
    total = summed_cross_entropy(torch.clone, hidden, torch.arange(4), vocab_size=VOCAB)
    with pytest.raises(RuntimeError, match="create_graph: a loss in chunks has no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_repeated_cross_entropy() -> None:
    logits, labels, weights = torch.randn(VOCAB, requires_grad=True), torch.tensor([3, 3, 0, 10]), torch.rand(4)
    for given in (None, weights):
        found = repeated_cross_entropy(logits, labels, given)
        expected = weighted_sum(logits.expand(4, -1), labels, given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_weighted_sum() -> None:
    logits, labels, weights = torch.randn(5, VOCAB), torch.tensor([1, IGNORE, 3, 0, 10]), torch.rand(5)
    each = [weights[i] * cross_entropy(logits[i], labels[i]) for i in (0, 2, 3, 4)]
    torch.testing.assert_close(weighted_sum(logits, labels, weights), sum(each))
