# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch modules over the ops: soft prompts for models of your own, with no transformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from softprompt_fast.ops import prefix_attention, prompt_concat, prompt_qkv

__all__ = ["PrefixAttention", "SoftPromptEmbedding"]


class SoftPromptEmbedding(nn.Module):
    """A trainable soft prompt, put in front of every row's token embeddings.

    Args:
        num_virtual_tokens: P, the length of the prompt.
        embedding_dim: H, the width of the model's embeddings.
        padding_side: which side of a row is padded; the prompt stays next to the row's own tokens.
        std: standard deviation of the initial prompt, drawn from a normal distribution around 0.
        device, dtype: of the parameter.

    Attributes:
        weight: the prompt, ``[P, H]``.

    Raises:
        ValueError: num_virtual_tokens or embedding_dim is not positive.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        embedding_dim: int,
        *,
        padding_side: Literal["left", "right"] = "left",
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(num_virtual_tokens=num_virtual_tokens, embedding_dim=embedding_dim)
        self.padding_side = padding_side
        self.weight = nn.Parameter(torch.empty(num_virtual_tokens, embedding_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=std)

    def forward(
        self,
        tokens: Tensor,
        table: Tensor | None = None,
        *,
        own_start: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Embeddings ``[B, P + S, H]`` of token ids ``[B, S]`` and their table ``[V, H]``, or of embeddings
        ``[B, S, H]``.

        ``own_start``, int ``[B]``, says where rows begin behind left padding; ``scale`` multiplies the tokens'
        embeddings. Errors: as :func:`softprompt_fast.ops.prompt_concat`.
        """
        return prompt_concat(
            tokens, table, self.weight, own_start=own_start, scale=scale, padding_side=self.padding_side
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, padding_side={self.padding_side!r}"


class PrefixAttention(nn.Module):
    """Self-attention with trainable keys and values that all rows share, as in prefix tuning (Li and Liang, 2021).

    One copy of the prefix serves every row of the batch, forward and backward.

    Args:
        embed_dim: H, width of the hidden states.
        num_heads: Hq, query heads.
        num_virtual_tokens: P, entries of the prefix.
        num_kv_heads: Hkv, a divisor of Hq. None: Hq.
        head_dim: D. None: ``H // Hq``.
        bias: whether the four projections have biases.
        causal: whether a query sees only the own keys up to itself.
        sliding_window: see :func:`softprompt_fast.ops.prefix_attention`.
        device, dtype: of the parameters.

    Attributes:
        prefix_key, prefix_value: the prefix, ``[Hkv, P, D]`` each.
        q_proj, k_proj, v_proj, o_proj: linear projections.

    Raises:
        ValueError: a size is not positive, or num_heads is no multiple of num_kv_heads, or embed_dim none of num_heads
            where head_dim is None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_virtual_tokens: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_positive(
            embed_dim=embed_dim, num_heads=num_heads, num_virtual_tokens=num_virtual_tokens, num_kv_heads=num_kv_heads
        )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads: expected a multiple of num_kv_heads, {num_kv_heads}, found {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim: expected a multiple of num_heads, {num_heads}, found {embed_dim}")
            head_dim = embed_dim // num_heads
        _check_positive(head_dim=head_dim)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.causal, self.sliding_window = causal, sliding_window
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        shape = num_kv_heads, num_virtual_tokens, head_dim
        self.prefix_key = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.prefix_value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.normal_(self.prefix_key)
        nn.init.normal_(self.prefix_value)

    def forward(
        self,
        hidden: Tensor,
        *,
        own_start: Tensor | None = None,
        own_end: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``hidden``, ``[B, S, H]``, to the prefix and to itself: ``[B, S, H]``.

        ``own_start`` and ``own_end``, int ``[B]``, are the rows' ranges between their padding; ``cos`` and ``sin``,
        ``[B or 1, S, at most D]``, rotate queries and own keys (RoPE). A padding query's output is finite and
        otherwise unspecified. Errors: as :func:`softprompt_fast.ops.prefix_attention` and
        :func:`softprompt_fast.ops.prompt_qkv`.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value, _ = prompt_qkv(
            hidden,
            [p.weight for p in projections],
            bias=None if self.q_proj.bias is None else [p.bias for p in projections],
            q_heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            norm="none",
            cos=cos,
            sin=sin,
        )
        out = prefix_attention(
            query,
            key,
            value,
            self.prefix_key,
            self.prefix_value,
            own_start=own_start,
            own_end=own_end,
            causal=self.causal,
            sliding_window=self.sliding_window,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{heads}, num_virtual_tokens={self.prefix_key.shape[1]}, causal={self.causal}"


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, found {size}")
