# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch: where their own tokens lie, and which prompts their cached tokens attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from softprompt_fast.cache import rows_held
from softprompt_fast.losses import IGNORE
from softprompt_fast.packed import Packed, RowPrompt


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None = None
) -> tuple[int, int]:
    """B and S of a call over ``input_ids`` ``[B, S]`` or ``inputs_embeds`` ``[B, S, H]``.

    Raises:
        ValueError: both or neither are given, other dimensions, no row, or labels that are not integers ``[B, S]``.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: pass exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    name, expected = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
    if given.dim() != expected:
        raise ValueError(f"{name}: expected {expected} dimensions, found shape {tuple(given.shape)}")
    batch, length = given.shape[:2]
    if batch == 0:
        raise ValueError(f"{name}: the batch is empty, found shape {tuple(given.shape)}")
    if labels is not None and labels.shape != (batch, length):
        raise ValueError(f"labels: expected shape {(batch, length)}, found {tuple(labels.shape)}")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels: expected token ids (int64), found {labels.dtype}")
    return batch, length


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """IndexError naming the id, its place and the vocabulary size where one is out of range (synchronises)."""
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        found = int(input_ids[row, column])
        raise IndexError(
            f"input_ids: token id {found} at row {row}, position {column} is outside the vocabulary of {vocab_size}"
        )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """IndexError naming the label, its place and the vocabulary size where one is neither -100 nor in it
    (synchronises)."""
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        found = int(labels[row, column])
        raise IndexError(
            f"labels: label {found} at row {row}, position {column} is neither -100 nor in the vocabulary of "
            f"{vocab_size}"
        )


def padding_ranges(attention_mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The ranges of ones of a 2-D mask: int32 ``own_start``, ``own_end`` ``[B]``; None where no row is padded there.

    Raises:
        ValueError: a row has a zero between ones: which position its later tokens have would be a guess.
    """
    mask = attention_mask != 0
    total = mask.shape[1]
    count = mask.sum(dim=1)
    if torch.compiler.is_compiling():
        start = torch.where(count > 0, mask.int().argmax(dim=1), total)
        return start.int(), (start + count).int()
    if bool((count == total).all()):
        return None, None
    start = torch.where(count > 0, mask.int().argmax(dim=1), total)
    last = total - mask.flip(1).int().argmax(dim=1)
    holes = (count > 0) & (last - start != count)
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has masked positions between its tokens; only padding at its ends is supported"
        )
    end = start + count
    return (
        start.int() if bool((start > 0).any()) else None,
        end.int() if bool((end < total).any()) else None,
    )


def own_ranges(
    attention_mask: Tensor, batch: int, past: int | Tensor, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`padding_ranges` of the mask of a call over `length` tokens behind `past` cached ones.

    Raises:
        ValueError: it is not ``[batch, past + length]``, or has holes.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask: expected shape {(batch, int(past + length))} (cached and new own tokens, no virtual "
            f"tokens), found {tuple(attention_mask.shape)}"
        )
    return padding_ranges(attention_mask)


def static_ranges(
    capacity: int, past: int | Tensor, length: int, own_end: Tensor | None, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where `length` new tokens of each row begin in a static cache that holds `past`, and where its own tokens end:
    int32 ``query_start``, ``own_end`` ``[B]``.

    Raises:
        ValueError: they are more than `capacity` (looked for on the CPU).
    """
    if device.type == "cpu" and not torch.compiler.is_compiling() and int(past) + length > capacity:
        raise ValueError(
            f"past_key_values: a static cache of max_cache_len={capacity} can't hold {int(past)} cached "
            f"and {length} new tokens"
        )
    query_start = torch.zeros(batch, dtype=torch.int32, device=device) + past
    filled = query_start + length
    return query_start, filled if own_end is None else torch.minimum(own_end, filled)


def row_positions(
    given: Tensor | None,
    past: int | Tensor,
    length: int,
    packed: Packed | None,
    index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Position ids ``[1 or B, S]`` of `length` tokens behind `past` cached ones: a row's virtual tokens, then its own
    from `own_start` on, or where the caller's `given` positions say."""
    virtual: int | Tensor = 0
    if packed is not None:
        virtual = packed.lengths[0] if index is None else packed.lengths_tensor[index.long()][:, None]
    if given is not None:
        return (virtual + given).to(device)
    own = (torch.arange(length, device=device) + past)[None]
    if own_end is not None:
        # Right padding may run past the model's positions; nobody sees those queries.
        own = torch.minimum(own, own_end[:, None] - 1)
    if own_start is not None:
        own = (own - own_start[:, None]).clamp(min=0)
    return virtual + own


def predict_empty_rows(
    out: Any,
    packed: Packed | None,
    index: Tensor | None,
    own_start: Tensor,
    own_end: Tensor | None,
    length: int,
    *,
    required: bool,
) -> None:
    """Where a row has no own token, what follows is predicted by its last virtual token: written to the last column of
    ``out.logits`` ``[B, C, V]``.

    Args:
        required: whether it is an error that nothing predicts it; a loss needs no such prediction.

    Raises:
        ValueError: nothing predicts it, and it is `required`.
    """
    empty = own_start >= (length if own_end is None else own_end)
    if torch.compiler.is_compiling() or not bool(empty.any()):
        return
    logits = out.logits.clone()
    for row in empty.nonzero().squeeze(1).tolist():
        place = -1 if packed is None else 0 if index is None else int(index[row])
        predicted = None if packed is None or place < 0 else packed.next_logits[place]
        if predicted is None and not required:
            continue
        if predicted is None:
            why = "no prompt"
            if packed is not None and place >= 0:
                prompt = packed.prompts[place]
                why = f"a prefix of keys and values only ({None if prompt is None else prompt[0]!r})"
            raise ValueError(
                f"input_ids: row {row} has no own token and {why}, so nothing predicts its first token; "
                "give it at least one, e.g. the BOS token"
            )
        logits[row, -1] = predicted.to(logits)
    out["logits"] = logits


def right_align(input_ids: Tensor, own_end: Tensor) -> Tensor:
    """Rotate each row so that its last real token stands in the last column."""
    length = input_ids.shape[1]
    column = torch.arange(length, device=input_ids.device)
    return input_ids.gather(1, (column + own_end.long()[:, None]) % length)


@dataclass(frozen=True)
class Claim:
    """What a cache's tokens belong to: per row a prefix and the start of its own tokens. Kept on the cache itself,
    which may outlive the prefixes' storage: so it has their names and versions only.

    Attributes:
        prompts, versions: of the batch's places (:class:`~softprompt_fast.packed.Packed`).
        index: int32 ``[B]``, each row's place, -1 for none; None: all rows have the only one.
        own_start: int ``[B]`` or None for 0.
        right_padded: whether rows end before their last column.
    """

    prompts: tuple[RowPrompt | None, ...]
    versions: tuple[int, ...]
    index: Tensor | None
    own_start: Tensor | None
    right_padded: bool = False

    @classmethod
    def of(
        cls, packed: Packed | None, index: Tensor | None, own_start: Tensor | None, right_padded: bool = False
    ) -> Claim:
        if packed is None:
            return cls((), (), index, own_start, right_padded)
        return cls(packed.prompts, packed.versions, index, own_start, right_padded)

    def is_of(self, packed: Packed | None, index: Tensor | None, own_start: Tensor | None) -> bool:
        """Whether it was made of these very objects."""
        same = self.versions is packed.versions if packed is not None else not self.versions
        return same and self.index is index and self.own_start is own_start

    def rows(self, batch: int) -> list[tuple[RowPrompt | None, int] | None]:
        """Each row's prompt and the version of it."""
        if not self.prompts:
            return [None] * batch
        known = [*zip(self.prompts, self.versions, strict=True), None]
        return [known[0]] * batch if self.index is None else [known[place] for place in self.index.tolist()]


def cached_length(cache: Any) -> int | Tensor:
    """Tokens that `cache` (None for no cache) holds per row.

    Raises:
        TypeError: it is no transformers cache.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: expected a transformers Cache, found {type(cache).__name__}")
    return cache.get_seq_length()


def check_continuation(cache: Cache | None, attention_mask: Tensor | None, batch: int, length: int) -> None:
    """ValueError where a mask or a cache handed to ``generate`` doesn't fit its ``[batch, length]`` own tokens."""
    past = int(cached_length(cache))
    if attention_mask is not None:
        shape, widths = tuple(attention_mask.shape), sorted({length, past + length})
        if attention_mask.dim() != 2 or shape[0] != batch or shape[1] not in widths:
            expected = " or ".join(str((batch, width)) for width in widths)
            raise ValueError(f"attention_mask: expected shape {expected} (no virtual tokens), found {shape}")
    if past and length <= past and (attention_mask is None or attention_mask.shape[1] == length):
        raise ValueError(
            f"input_ids: expected the whole text, longer than the {past} tokens in past_key_values, found {length} "
            f"tokens; to pass only the new ones, give an attention_mask of all {past + length}"
        )


def claim_rows(
    cache: Cache,
    packed: Packed | None,
    index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    batch: int,
    past: int | Tensor,
) -> Tensor | None:
    """Note on `cache` which prompt each row attends to and where its tokens start; returns ``own_start``.

    A caller who continues a left-padded cache without repeating its mask gets the start that the cache knows.

    Raises:
        ValueError: the cached tokens attended to other prompts or to another version of them, began elsewhere, were
            padded on the right, or are not known.
    """
    held = rows_held(cache)
    if held is not None and held != batch:
        raise ValueError(f"past_key_values: expected a cache of {batch} rows, as in this batch, found one of {held}")
    before: Claim | None = getattr(cache, "soft_prompt_claim", None)
    now = Claim.of(packed, index, own_start, own_end is not None)
    if torch.compiler.is_compiling():
        cache.soft_prompt_claim = now
        return own_start
    # The very same objects, as in every decoding step of `generate`.
    if before is not None and before.is_of(packed, index, own_start):
        return own_start
    if int(past) == 0:
        cache.soft_prompt_claim = now
        return own_start
    if before is None:
        raise ValueError(
            "past_key_values: the cache holds tokens that did not come from this model; pass one that it returned"
        )
    if before.right_padded:
        raise ValueError(
            "past_key_values: its rows were padded on the right, so it can't be continued; pad on the left"
        )
    for row, (old, new) in enumerate(zip(before.rows(batch), now.rows(batch), strict=True)):
        if old == new:
            continue
        names = [None if prompt is None else prompt[0] for prompt in (old, new)]
        if names[0] != names[1]:
            what = f"prompt {_name(names[0])}, but row {row} now asks for {_name(names[1])}"
        else:
            what = f"an earlier version of prompt {_name(names[0])} (row {row}), which changed since"
        raise ValueError(f"past_key_values: the cached tokens attended to {what}")
    if own_start is None:
        own_start = before.own_start
    elif before.own_start is None or not torch.equal(before.own_start, own_start):
        raise ValueError("attention_mask: its left padding is not that of the tokens in past_key_values")
    cache.soft_prompt_claim = Claim.of(packed, index, own_start)
    return own_start


def _name(prompt: RowPrompt | None) -> str:
    if prompt is None:
        return "None"
    return repr(prompt[0]) if prompt[1] is None else f"{prompt[0]!r} (task {prompt[1]})"
