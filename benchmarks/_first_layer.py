# SPDX-License-Identifier: Apache-2.0
"""A decoder's first layer from token ids and the prompt to what attention gives: embedding, concatenation, RMSNorm,
QKV, RoPE, append to the cache, attention. In PyTorch's operators, and in this package's kernels.

A decode step comes behind a compiled prompt and cached own tokens. In a prefill the prompt runs too: in PyTorch in
every row (``torch.cat``), in ours once, or in every row as well ("concat": what gather and concatenation cost there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import heuristics
from softprompt_fast.backends.norm import Norm

Inputs = dict[str, Tensor]
Results = tuple[Tensor, Tensor, Tensor]
"""Of own tokens: attention's ``[B, Hq, S, D]``, and the new keys and values ``[B, Hkv, S, D]``."""
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """B rows of `own` new tokens behind `past` cached ones (0: a prefill) and P virtual tokens."""

    batch: int
    own: int
    virtual: int
    past: int
    width: int
    vocabulary: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def columns(self) -> int:
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rows(self) -> int:
        """Of the projection, where the prompt runs once."""
        return self.batch * self.own + (0 if self.past else self.virtual)

    @property
    def flops(self) -> float:
        keys = self.virtual + self.past + (self.own + 1) / 2
        scores = self.batch * self.own * keys + (0 if self.past else self.virtual * (self.virtual + 1) / 2)
        return 2 * self.rows * self.columns * self.width + 4 * scores * self.q_heads * self.head_dim

    @property
    def numbers(self) -> float:
        """Weights, embeddings, cached keys and values, new ones and results, each once."""
        cached = 2 * self.kv_heads * self.head_dim * (self.batch * self.past + (self.virtual if self.past else 0))
        return self.columns * self.width + self.rows * (self.width + self.columns) + cached

    def __str__(self) -> str:
        return f"B{self.batch} P{self.virtual} S{self.own} T{self.past + self.own}"


class FirstLayer:
    """A layer of `shape` with random weights."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        heads = shape.q_heads, shape.kv_heads, shape.kv_heads
        self.table = self._random(shape.vocabulary, shape.width)
        self.weights = [self._random(n * shape.head_dim, shape.width) * shape.width**-0.5 for n in heads]
        self.gain = 1 + 0.1 * self._random(shape.width)
        positions = shape.virtual + shape.past + shape.own
        angle = torch.rand(1, positions, shape.head_dim // 2, device=device).repeat(1, 1, 2) * 6.3
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def widened(self, dtype: torch.dtype) -> FirstLayer:
        """The same layer in another dtype, for a reference."""
        other = object.__new__(FirstLayer)
        for name, value in vars(self).items():
            wide = [w.to(dtype) for w in value] if isinstance(value, list) else value
            setattr(other, name, wide.to(dtype) if isinstance(wide, Tensor) else wide)
        other.dtype = dtype
        return other

    def make(self) -> Inputs:
        s = self.shape
        inputs = {"ids": torch.randint(0, s.vocabulary, (s.batch, s.own), device=self.device)}
        if not s.past:
            return {**inputs, "prompt": self._random(s.virtual, s.width)}
        own = [self._random(s.batch, s.kv_heads, s.past + s.own, s.head_dim) for _ in range(2)]
        prefix = [self._random(s.kv_heads, s.virtual, s.head_dim) for _ in range(2)]
        return {**inputs, **dict(zip(("keys", "values", "prefix_key", "prefix_value"), (*own, *prefix), strict=True))}

    # -- PyTorch's operators --

    def with_copies(self, inputs: Inputs) -> Inputs:
        """With a cache for the virtual and own tokens of every row."""
        s = self.shape
        if not s.past:
            empty = torch.empty(2, s.batch, s.kv_heads, s.virtual + s.own, s.head_dim, device=self.device)
            return {**inputs, "all_keys": empty[0].to(self.dtype), "all_values": empty[1].to(self.dtype)}
        pairs = ((inputs["prefix_key"], inputs["keys"]), (inputs["prefix_value"], inputs["values"]))
        both = [torch.cat([prefix.expand(s.batch, -1, -1, -1), own], 2) for prefix, own in pairs]
        return {**inputs, "all_keys": both[0], "all_values": both[1]}

    def operators(self, inputs: Inputs) -> Results:
        """One after the other, over what :meth:`with_copies` gives."""
        s = self.shape
        hidden = F.embedding(inputs["ids"], self.table)
        if not s.past:
            hidden = torch.cat([inputs["prompt"].expand(s.batch, -1, -1), hidden], 1)
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.gain, EPS)
        projected = (F.linear(normed, w).unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for w in self.weights)
        query, key, value = projected
        rows = slice(self.cos.shape[1] - hidden.shape[1], None)
        query, key = (self._rotated(x, rows) for x in (query, key))
        keys, values = inputs["all_keys"], inputs["all_values"]
        keys[:, :, rows].copy_(key)
        values[:, :, rows].copy_(value)
        attended = F.scaled_dot_product_attention(query, keys, values, is_causal=not s.past, enable_gqa=True)
        return attended[:, :, -s.own :], key[:, :, -s.own :], value[:, :, -s.own :]

    def _rotated(self, x: Tensor, rows: slice) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos[:, None, rows] + torch.cat([-second, first], -1) * self.sin[:, None, rows]

    # -- ours --

    def ours(self, inputs: Inputs, backend: str | None = None) -> Results:
        """The prompt once, or compiled before. ``backend``: whose kernels write into the cache; None: the ops as
        "auto" picks them, and a copy."""
        s = self.shape
        if s.past:
            keys, values = inputs["keys"], inputs["values"]
            prefix = inputs["prefix_key"], inputs["prefix_value"]
        else:
            pair = self._places(1, s.virtual)
            query = self._project(inputs["ids"][:1, :0], inputs["prompt"], *pair, 0, backend)
            self._attend(query, *pair, *(x[0, :, :0] for x in pair), backend)
            prefix = pair[0][0], pair[1][0]
            keys, values = self._places(s.batch, s.own)
        new = keys[:, :, s.past :], values[:, :, s.past :]
        query = self._project(inputs["ids"], None, *new, s.virtual + s.past, backend)
        return self._attend(query, keys, values, *prefix, backend), *new

    def concatenated(self, inputs: Inputs, backend: str | None = None) -> Results:
        """A prefill with the prompt in front of every row."""
        s = self.shape
        keys, values = self._places(s.batch, s.virtual + s.own)
        query = self._project(inputs["ids"], inputs["prompt"], keys, values, 0, backend)
        attended = self._attend(query, keys, values, keys[0, :, :0], values[0, :, :0], backend)
        return attended[:, :, s.virtual :], keys[:, :, s.virtual :], values[:, :, s.virtual :]

    def _places(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        shape = (batch, self.shape.kv_heads, length, self.shape.head_dim)
        return self.table.new_empty(shape), self.table.new_empty(shape)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        prefix_key, prefix_value, backend = rest
        return ops.prefix_attention(query, keys, values, prefix_key, prefix_value, backend=backend)

    def _project(
        self, ids: Tensor, prompt: Tensor | None, keys: Tensor, values: Tensor, first: int, backend: str | None
    ) -> Tensor:
        """Queries of ``[prompt, ids]`` in every row, from position `first` on; keys and values into their places."""
        s = self.shape
        prompt = self.table[:0] if prompt is None else prompt
        batch, length = ids.shape[0], prompt.shape[0] + ids.shape[1]
        rows = slice(first, first + length)
        cos, sin = self.cos[:, rows], self.sin[:, rows]
        few = heuristics.fuse_projection(batch * length)
        if backend == "cpu":
            return self._project_on_the_cpu(ids, prompt, keys, values, cos, sin)
        if backend == "cuda" and few:
            from softprompt_fast.backends.cuda import prompt_qkv

            query = self.table.new_empty(batch, length, s.q_heads, s.head_dim).transpose(1, 2)
            residual = self.table.new_empty(batch, length, s.width)
            source = (ids, self.table, prompt, None, None, None, prompt.shape[0], 1.0, 1.0, True)
            norm = ("rms", self.gain, None, 0.0, EPS)
            layer = (s.q_heads, s.kv_heads, *norm, cos, sin, False)
            prompt_qkv.into_cache(*source, self.weights, None, *layer, query, keys, values, residual)
            return query
        query, key, value, _ = ops.prompt_qkv(
            ids,
            self.weights,
            q_heads=s.q_heads,
            kv_heads=s.kv_heads,
            norm_weight=self.gain,
            eps=EPS,
            cos=cos,
            sin=sin,
            table=self.table,
            prompt=prompt,
            backend=backend,
        )
        for place, computed in zip((keys, values), (key, value), strict=True):
            place.copy_(computed)
        return query

    def _project_on_the_cpu(self, ids: Tensor, prompt: Tensor, *places: Tensor) -> Tensor:
        """As the fused decoder does it: the rows gathered and concatenated in one pass, and one call from there on."""
        from softprompt_fast.backends.cpu import prompt_concat, prompt_qkv
        from softprompt_fast.backends.cpu._linear import packed

        s = self.shape
        keys, values, cos, sin = places
        source = (ids, self.table, prompt, None, None, None, prompt.shape[0], 1.0, 1.0, self.dtype, True)
        hidden = prompt_concat.forward(*source)
        qkv = packed(self.weights, (), heads=(s.q_heads, s.kv_heads, s.kv_heads))
        norm = Norm("rms", self.gain, None, 0.0, EPS)
        return prompt_qkv.into_cache(hidden, norm, qkv, s.q_heads, s.kv_heads, cos, sin, keys, values)
