# SPDX-License-Identifier: Apache-2.0
"""What tests of the ops, here and elsewhere, are made of: inputs that catch stray reads, outputs that catch missed
writes, and a tolerance that is measured instead of guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AttentionInputs", "assert_within_noise", "attention_inputs", "guarded", "poisoned_memory", "visible"]


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    order: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Normal random numbers in a view, with strides, of a buffer that holds NaN everywhere else: a read beyond the
    view shows in the result. ``order`` lists the dimensions from outermost to innermost in memory; without a
    ``device`` it is torch's default one."""
    order = range(len(shape)) if order is None else order
    # One more element before and behind in every dimension but the innermost, which kernels want dense.
    buffer = torch.full([shape[d] + 2 * (d != order[-1]) for d in order], float("nan"), dtype=dtype, device=device)
    for place, d in enumerate(order):
        if d != order[-1]:
            buffer = buffer.narrow(place, 1, shape[d])
    view = buffer.permute([list(order).index(d) for d in range(len(shape))])
    return view.copy_(torch.randn(*shape, dtype=torch.float64, device=device) * scale)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it every ``torch.empty`` is full of NaN (integers: the largest), so an unwritten result shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its properties are made at run time, unseen by type checkers
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def assert_within_noise(
    actual: Tensor, oracle: Tensor, baseline: Tensor, what: str = "result", *, factor: float = 1.5
) -> None:
    """The error of ``actual`` against the float64 ``oracle`` is at most ``factor`` times that of ``baseline``, what
    PyTorch itself computes from the same inputs in the same dtype.

    Held to it are the root mean square of the error and its largest element. A baseline may be exact by luck, and the
    worst elements of two correct orders of summation differ by chance, so some units in the last place of the oracle's
    largest element are always allowed: 1 to the mean; to the largest 16, or 2 in 16 bits, where the sums are float32.
    """
    assert actual.shape == oracle.shape == baseline.shape, (what, actual.shape, oracle.shape, baseline.shape)
    assert actual.dtype == baseline.dtype, (what, actual.dtype, baseline.dtype)
    infinite = torch.isinf(oracle)
    assert torch.equal(actual[infinite].double(), oracle[infinite]), f"{what}: infinities differ"
    if infinite.all():
        return
    error, noise = ((x.double() - oracle)[~infinite] for x in (actual, baseline))
    ulp = torch.finfo(actual.dtype).eps * oracle[~infinite].abs().max().item()
    worst = 16 if actual.element_size() >= 4 else 2
    for norm, measure, ulps in (("rms", _rms, 1), ("largest", _largest, worst)):
        found, base = measure(error).item(), measure(noise).item()
        limit = max(factor * base, ulps * ulp)
        # Not "found > limit": a NaN has to fail.
        assert found <= limit, (
            f"{what}: {norm} error {found:.2e}, limit {limit:.2e} (baseline {base:.2e}, ulp {ulp:.2e})"
        )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


@dataclass
class AttentionInputs:
    """Arguments of ``prefix_attention``: five tensors, and the keyword arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.prefix_key, self.prefix_value

    @property
    def gradient_inputs(self) -> list[Tensor]:
        sinks = self.options.get("sinks")
        return [*self.tensors] if sinks is None else [*self.tensors, sinks]

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        options = {
            name: x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.options.items()
        }
        query, key, value, prefix_key, prefix_value = (x.detach().to(dtype) for x in self.tensors)
        return AttentionInputs(query, key, value, prefix_key, prefix_value, options)

    def requires_grad_(self) -> AttentionInputs:
        for x in self.gradient_inputs:
            x.requires_grad_()
        return self

    def real_queries(self) -> Tensor:
        """Bool ``[B, 1, S, 1]``: False where a query is padding, whose output is unspecified."""
        batch, _, queries, _ = self.query.shape
        own = self.key.shape[2]
        o = self.options
        position = _values(o.get("query_start"), batch, own - queries)[:, None] + torch.arange(queries, device="cpu")
        start, end = _values(o.get("own_start"), batch, 0), _values(o.get("own_end"), batch, own)
        real = (position >= start[:, None]) & (position < end[:, None])
        return real[:, None, :, None].to(self.query.device)

    def baseline(self) -> tuple[Tensor, Tensor]:
        """The same attention as PyTorch's own operators compute it, the prefix expanded for every row: out from
        scaled_dot_product_attention where that has the options, lse from logsumexp."""
        o = self.options
        _, q_heads, _, head_dim = self.query.shape
        hidden = ~visible(self)
        prefix_key, prefix_value = _row_prefixes(self, hidden.shape[-1] - self.key.shape[2])
        groups = q_heads // self.key.shape[1]
        key = torch.cat([prefix_key, self.key], 2).repeat_interleave(groups, 1)
        value = torch.cat([prefix_value, self.value], 2).repeat_interleave(groups, 1)
        scale = o.get("scale") or head_dim**-0.5
        mask = hidden.new_zeros(hidden.shape, dtype=self.query.dtype).masked_fill(hidden, float("-inf"))[:, None]
        if o.get("bias") is not None:
            mask = mask + o["bias"]
        scores = self.query @ key.transpose(-1, -2) * scale
        if o.get("softcap") is not None:
            scores = torch.tanh(scores / o["softcap"]) * o["softcap"]
        scores = scores + mask
        if o.get("sinks") is not None:
            sink = o["sinks"].to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        lse = torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
        if o.get("softcap") is None and o.get("sinks") is None and _fused_attention_serves(self.query, value, mask):
            return F.scaled_dot_product_attention(self.query, key, value, attn_mask=mask, scale=scale), lse
        return torch.softmax(scores, -1)[..., : key.shape[2]].nan_to_num(0.0) @ value, lse


def _fused_attention_serves(query: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether PyTorch's kernels behind scaled_dot_product_attention are a baseline: on a CPU always. On a GPU heads of
    other sizes go to an implementation in float32, and a query that sees nothing may get NaN."""
    if query.device.type == "cpu":
        return True
    return query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0 and not bool(torch.isneginf(mask).all(-1).any())


def attention_inputs(
    batch: int = 3,
    q_heads: int = 4,
    kv_heads: int = 2,
    queries: int = 5,
    own: int = 7,
    head_dim: int = 16,
    v_dim: int | None = None,
    prefix: int = 6,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **options: Any,
) -> AttentionInputs:
    """Random inputs of ``prefix_attention``, laid out as transformers hands them over: views of ``[B, S, H, D]``
    memory. Lists among the options become int32 tensors, ``sinks=True`` and ``bias=(b, h, s, columns)`` random."""
    v_dim = head_dim if v_dim is None else v_dim
    made: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, list):
            value = torch.tensor(value, dtype=torch.int32, device=device)
        elif name == "sinks":
            value = torch.randn(q_heads, dtype=torch.float64, device=device).to(dtype)
        elif name == "bias":
            value = guarded(value, dtype, device=device)
        made[name] = value
    order = (0, 2, 1, 3)
    return AttentionInputs(
        guarded((batch, q_heads, queries, head_dim), dtype, order=order, device=device),
        guarded((batch, kv_heads, own, head_dim), dtype, order=order, device=device),
        guarded((batch, kv_heads, own, v_dim), dtype, order=order, device=device),
        guarded((kv_heads, prefix, head_dim), dtype, device=device),
        guarded((kv_heads, prefix, v_dim), dtype, device=device),
        made,
    )


def visible(inputs: AttentionInputs) -> Tensor:
    """Which of "prefix, then own keys" each query sees, bool ``[B, S, W + T]``: the contract of ``prefix_attention``,
    one query and one key at a time."""
    o = inputs.options
    batch, _, queries, _ = inputs.query.shape
    own, packed = inputs.key.shape[2], inputs.prefix_key.shape[1]
    columns = packed if o.get("bias") is None else o["bias"].shape[-1] - own
    window, causal = o.get("sliding_window"), o.get("causal", True)
    starts, ends = _values(o.get("own_start"), batch, 0).tolist(), _values(o.get("own_end"), batch, own).tolist()
    firsts = _values(o.get("query_start"), batch, own - queries).tolist()
    lengths = [stop - start for start, stop in _prefix_ranges(inputs)]
    seen = torch.zeros(batch, queries, columns + own, dtype=torch.bool, device="cpu")
    for b in range(batch):
        for i in range(queries):
            position = firsts[b] + i
            place = lengths[b] + position - starts[b]
            for p in range(lengths[b]):
                seen[b, i, p] = window is None or place - p < window
            for j in range(starts[b], ends[b]):
                near = window is None or place - (lengths[b] + j - starts[b]) < window
                seen[b, i, columns + j] = near and (not causal or j <= position)
    return seen.to(inputs.query.device)


def rows_of(inputs: AttentionInputs, rows: Sequence[int]) -> AttentionInputs:
    """The same call for some of the batch's rows, in the given order."""
    chosen = torch.tensor(rows, device=inputs.query.device)
    per_row = ("prefix_index", "own_start", "own_end", "query_start")
    options = {name: x[chosen] if name in per_row else x for name, x in inputs.options.items()}
    bias = options.get("bias")
    if bias is not None and bias.shape[0] > 1:
        options["bias"] = bias[chosen]
    own = {"query": inputs.query[chosen], "key": inputs.key[chosen], "value": inputs.value[chosen]}
    return replace(inputs, **own, options=options)


def _values(index: Tensor | None, batch: int, default: int) -> Tensor:
    return torch.full((batch,), default, device="cpu") if index is None else index.to("cpu", torch.int64)


def _prefix_ranges(inputs: AttentionInputs) -> list[tuple[int, int]]:
    offsets = inputs.options.get("prefix_offsets")
    values = [0, inputs.prefix_key.shape[1]] if offsets is None else offsets.tolist()
    index = _values(inputs.options.get("prefix_index"), inputs.query.shape[0], 0).tolist()
    return [(0, 0) if n < 0 else (values[n], values[n + 1]) for n in index]


def _row_prefixes(inputs: AttentionInputs, columns: int) -> tuple[Tensor, Tensor]:
    """Every row's own copy of its prefix, zeros behind it: ``[B, Hkv, columns, ...]``."""
    copies = []
    for packed in (inputs.prefix_key, inputs.prefix_value):
        rows = [F.pad(packed[:, a:b], (0, 0, 0, columns - (b - a))) for a, b in _prefix_ranges(inputs)]
        copies.append(torch.stack(rows) if rows else packed.new_zeros(0, packed.shape[0], columns, packed.shape[2]))
    return copies[0], copies[1]
