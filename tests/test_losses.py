# SPDX-License-Identifier: Apache-2.0
"""The loss functions against transformers' own loss over whole sequences, virtual tokens included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from softprompt_fast.losses import (
    IGNORE,
    causal_lm_loss,
    labelled_columns,
    split_labels,
    visible_labels,
    weighted_sum,
)

VOCAB = 11


def own_and_first(logits: Tensor, labels: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of causal_lm_loss from logits ``[B, 1 + S, V]``, the first of each row being its prefix's."""
    shifted, first = split_labels(labels, start)
    rows = (first != IGNORE).nonzero()[:, 0]
    return logits[:, 1:], shifted, logits[rows, 0], first[rows]


def test_unpadded_rows_give_transformers_loss() -> None:
    logits, labels = torch.randn(3, 6, VOCAB), torch.randint(0, VOCAB, (3, 5))
    labels[0, :2], labels[1, 3], labels[2, 4] = IGNORE, IGNORE, IGNORE
    whole = torch.cat([torch.full((3, 1), IGNORE), labels], dim=1)
    expected = ForCausalLMLoss(logits, whole, VOCAB)
    torch.testing.assert_close(causal_lm_loss(*own_and_first(logits, labels, None)), expected)
    by_items = ForCausalLMLoss(logits, whole, VOCAB, num_items_in_batch=torch.tensor(40))
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(causal_lm_loss(*own_and_first(logits, labels, None), num_items=items), by_items)


def test_padded_rows_give_the_mean_over_rows_alone() -> None:
    start, end = torch.tensor([2, 0, 3]), torch.tensor([5, 4, 3])  # the last row has no own token
    logits, labels = torch.randn(3, 6, VOCAB), torch.randint(0, VOCAB, (3, 5))
    visible = visible_labels(labels, start, end)
    assert (visible != IGNORE).sum(dim=1).tolist() == [3, 4, 0]
    found = causal_lm_loss(*own_and_first(logits, visible, start))
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


def test_only_labelled_columns_are_needed() -> None:
    logits, labels = torch.randn(2, 6, VOCAB), torch.full((2, 5), IGNORE)
    labels[0, 2], labels[1, 4] = 3, 5
    own, shifted, prefix_logits, first = own_and_first(logits, labels, None)
    columns = labelled_columns(shifted)
    assert columns.tolist() == [1, 3]
    kept = causal_lm_loss(own[:, columns], shifted[:, columns], prefix_logits, first)
    torch.testing.assert_close(kept, causal_lm_loss(own, shifted, prefix_logits, first))


@pytest.mark.parametrize("columns", [4, 0])
def test_nothing_labelled_is_zero_with_a_zero_gradient(columns: int) -> None:
    logits = torch.randn(2, columns, VOCAB, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, columns), IGNORE), None, None)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.shape == logits.shape and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 64, VOCAB).to(dtype), torch.randint(0, VOCAB, (4, 64))
    loss = causal_lm_loss(logits, labels, None, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float().flatten(0, 1), labels.flatten()))
    assert causal_lm_loss(logits.double(), labels, None, None).dtype == torch.float64


def test_weighted_sum() -> None:
    logits, labels, weights = torch.randn(5, VOCAB), torch.tensor([1, IGNORE, 3, 0, 10]), torch.rand(5)
    each = [weights[i] * cross_entropy(logits[i], labels[i]) for i in (0, 2, 3, 4)]
    torch.testing.assert_close(weighted_sum(logits, labels, weights), sum(each))
