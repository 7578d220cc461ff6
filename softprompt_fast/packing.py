# SPDX-License-Identifier: Apache-2.0
"""Sequence packing: several short rows written one after another into one, as transformers' and TRL's collators do.

What says where a segment begins is ``position_ids`` that restart at 0. Here a segment is a row of its own behind the
shared prefix, so packed rows are unpacked to one row a segment, run, and their results put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.losses import IGNORE

#: What flattening collators say besides, for attention kernels that read it there.
SEGMENT_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


@dataclass(frozen=True)
class Segments:
    """The segments of packed rows: N of them in ``[B, S]`` places.

    Attributes:
        places: int64 ``[n]``, the real tokens as ``row * S + column``. segment: int64 ``[n]``, the segment of each;
            column: int64 ``[n]``, its position in it.
        rows: int64 ``[N]``, the packed row of each segment. lengths: int64 ``[N]``.
        shape: ``(B, S)``.
    """

    places: Tensor
    segment: Tensor
    column: Tensor
    rows: Tensor
    lengths: Tensor
    shape: tuple[int, int]

    @classmethod
    def find(cls, position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int]) -> Segments | None:
        """The segments of rows with these positions ``[B or 1, S]``; None if no row holds more than one.

        Args:
            attention_mask: ``[B, S]``, zeros at padding anywhere between segments; None for no padding.

        Raises:
            ValueError: a segment's positions don't count up by one.
        """
        if position_ids.shape[-1] != shape[1] or position_ids.dim() != 2 or shape[1] == 0:
            return None
        positions = position_ids.expand(shape)
        real = torch.ones_like(positions, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        starts = real & (positions == 0)
        if int(starts.sum(dim=1).max()) < 2:
            return None
        follows = real[:, 1:] & real[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
        wrong = real & ~starts
        wrong[:, 1:] &= ~follows
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"position_ids: in packed rows each segment counts 0, 1, 2, ..., found {int(positions[row, column])} "
                f"at row {row}, position {column}"
            )
        places = real.flatten().nonzero().squeeze(1)
        first = starts.flatten()[places]
        segment = first.cumsum(0) - 1
        return cls(
            places=places,
            segment=segment,
            column=positions.flatten()[places],
            rows=places[first] // shape[1],
            lengths=segment.bincount(),
            shape=shape,
        )

    @property
    def mask(self) -> Tensor:
        """The attention mask ``[N, longest]`` of unpacked rows, padded on the right."""
        column = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return (column < self.lengths[:, None]).long()

    def unpack(self, name: str, packed: Tensor, fill: int = 0) -> Tensor:
        """Argument `name` ``[B, S, ...]`` -> ``[N, longest, ...]``, `fill` at padding; keeps the graph.

        Raises:
            ValueError: it is not of that shape.
        """
        if packed.shape[:2] != self.shape:
            raise ValueError(f"{name}: expected shape {self.shape}, as the packed input, found {tuple(packed.shape)}")
        size = (len(self.lengths), int(self.lengths.max()), *packed.shape[2:])
        out = packed.new_full(size, fill)
        return out.index_put((self.segment, self.column), packed.flatten(0, 1)[self.places])

    def pack(self, unpacked: Tensor) -> Tensor:
        """``[N, longest, ...]`` -> ``[B, S, ...]``, zeros at padding; keeps the graph."""
        batch, length = self.shape
        out = unpacked.new_zeros(batch * length, *unpacked.shape[2:])
        out = out.index_put((self.places,), unpacked[self.segment, self.column])
        return out.unflatten(0, self.shape)

    def per_segment(self, name: str, values: Any) -> Any:
        """What a caller gave per packed row or per segment (a list or a 1-D tensor), per segment; a single value and
        None as they are.

        Raises:
            ValueError: their number is neither.
        """
        if not isinstance(values, (Sequence, Tensor)) or isinstance(values, str):
            return values
        if len(values) not in (self.shape[0], len(self.lengths)):
            raise ValueError(
                f"{name}: expected one per packed row ({self.shape[0]}) or per segment ({len(self.lengths)}), found "
                f"{len(values)}"
            )
        if len(values) == len(self.lengths):
            return values
        return values[self.rows] if isinstance(values, Tensor) else [values[row] for row in self.rows.tolist()]

    def run(
        self,
        forward: Callable[..., Any],
        *,
        prompt: Any,
        task_ids: Any,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        **kwargs: Any,
    ) -> Any:
        """``SoftPromptModel.forward`` of packed rows: every segment as a row of its own, its results where it stood.

        Raises:
            ValueError: what has no place in packed rows is asked for.
        """
        if use_cache or kwargs.get("output_attentions") or isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
            raise ValueError(
                "position_ids: packed rows (positions restart at 0) can't be combined with use_cache=True, "
                "output_attentions or logits_to_keep"
            )
        for name, fill in (("input_ids", 0), ("inputs_embeds", 0), ("labels", IGNORE), ("input_type_mask", 0)):
            if kwargs[name] is not None:
                kwargs[name] = self.unpack(name, kwargs[name], fill)
        out = forward(
            attention_mask=self.mask,
            prompt=self.per_segment("prompt", prompt),
            task_ids=self.per_segment("task_ids", task_ids),
            use_cache=False,
            **kwargs,
        )
        if out.get("logits") is not None:
            out["logits"] = self.pack(out.logits)
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(self.pack(states) for states in out.hidden_states)
        return out


def find_segments(
    options: dict[str, Any], attention_mask: Tensor | None, cache: Any, shape: tuple[int, int]
) -> Segments | None:
    """The segments of a call's packed rows, None where it has none: of ``[B, S]`` own tokens without a `cache`.

    Args:
        options: the call's further arguments; the positions of packed rows, and what collators say besides
            (:data:`SEGMENT_ARGUMENTS`), are taken out of it.

    Raises:
        ValueError: a collator speaks of segments and gives no positions, or positions that don't count up by one.
    """
    told = [name for name in SEGMENT_ARGUMENTS if options.pop(name, None) is not None]
    positions = options.get("position_ids")
    if positions is None:
        if told:
            raise ValueError(f"position_ids: packed rows ({', '.join(sorted(told))}) need positions that restart at 0")
        return None
    if cache is not None or (attention_mask is not None and attention_mask.shape != shape):
        return None
    segments = Segments.find(positions, attention_mask, shape)
    if segments is not None:
        del options["position_ids"]
    return segments
