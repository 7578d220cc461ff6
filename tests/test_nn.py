# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_fast import nn as spf_nn
from tests.device import float64


def test_soft_prompt_embedding() -> None:
    module = spf_nn.SoftPromptEmbedding(3, 6)
    table, ids = torch.randn(11, 6), torch.randint(0, 11, (2, 4))
    out = module(ids, table)
    assert torch.equal(out, torch.cat([module.weight.expand(2, -1, -1), table[ids]], 1))
    assert torch.equal(module(table[ids]), out)
    padded = module(ids, table, own_start=torch.tensor([0, 2]), scale=2.0)
    assert torch.equal(padded[1, :2], torch.zeros(2, 6)) and torch.equal(padded[1, 2:5], module.weight)
    assert torch.equal(padded[1, 5:], table[ids[1, 2:]] * 2)
    out.sum().backward()
    assert module.weight.grad.eq(2).all()


def expanded(module: spf_nn.PrefixAttention, hidden: Tensor, mask: Tensor) -> Tensor:
    """The same attention in PyTorch alone, the prefix copied to every row."""
    batch, length, _ = hidden.shape
    heads = (
        (module.q_proj, module.num_heads),
        (module.k_proj, module.num_kv_heads),
        (module.v_proj, module.num_kv_heads),
    )
    query, key, value = (p(hidden).view(batch, length, n, -1).transpose(1, 2) for p, n in heads)
    key = torch.cat([module.prefix_key.expand(batch, -1, -1, -1), key], 2)
    value = torch.cat([module.prefix_value.expand(batch, -1, -1, -1), value], 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return module.o_proj(out.transpose(1, 2).flatten(2))


@float64
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_prefix_attention(causal: bool, bias: bool) -> None:
    module = spf_nn.PrefixAttention(12, 4, 3, num_kv_heads=2, bias=bias, causal=causal, dtype=torch.float64)
    hidden = torch.randn(2, 5, 12, dtype=torch.float64)
    own = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.ones(5, 5, dtype=torch.bool)
    mask = torch.cat([torch.ones(5, 3, dtype=torch.bool), own], 1)
    out, want = module(hidden), expanded(module, hidden, mask)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    parameters = list(module.parameters())
    assert len(parameters) == (10 if bias else 6)
    for x, y in zip(
        torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@float64
def test_prefix_attention_of_padded_rows() -> None:
    module = spf_nn.PrefixAttention(12, 4, 3, sliding_window=4, dtype=torch.float64)
    hidden = torch.randn(2, 5, 12, dtype=torch.float64)
    out = module(hidden, own_start=torch.tensor([0, 2]), own_end=torch.tensor([4, 5]))
    torch.testing.assert_close(out[0, :4], module(hidden[:1, :4])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1, 2:], module(hidden[1:, 2:])[0], rtol=1e-12, atol=1e-12)


def test_only_the_prefix_learns() -> None:
    """Prefix tuning: frozen projections, and the loss falls."""
    module = spf_nn.PrefixAttention(8, 2, 4)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("prefix"))
    before = copy.deepcopy(module.state_dict())
    hidden, target = torch.randn(4, 3, 8), torch.randn(1, 1, 8).expand(4, 3, 8)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(module(hidden), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, x in module.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"prefix_key", "prefix_value"}


@torch.no_grad()
def test_state_dict_round_trip() -> None:
    module = spf_nn.PrefixAttention(8, 2, 4)
    other = spf_nn.PrefixAttention(8, 2, 4)
    other.load_state_dict(module.state_dict())
    hidden = torch.randn(1, 3, 8)
    assert torch.equal(module(hidden), other(hidden))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spf_nn.SoftPromptEmbedding(0, 4), "num_virtual_tokens: expected at least 1, found 0"),
        (lambda: spf_nn.SoftPromptEmbedding(4, -1), "embedding_dim: expected at least 1, found -1"),
        (lambda: spf_nn.PrefixAttention(8, 3, 4), "embed_dim: expected a multiple of num_heads, 3, found 8"),
        (lambda: spf_nn.PrefixAttention(9, 3, 4, num_kv_heads=2), "num_heads: expected a multiple of num_kv_heads, 2"),
        (lambda: spf_nn.PrefixAttention(8, 2, 0), "num_virtual_tokens: expected at least 1"),
        (lambda: spf_nn.PrefixAttention(8, 2, 4, head_dim=0), "head_dim: expected at least 1"),
    ],
)  # fmt: skip
def test_bad_sizes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_needs_no_transformers() -> None:
    code = "import sys, softprompt_fast.nn; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
