# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' peers answer what we answer: a speed-up over a different answer is none."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from softprompt_fast import SoftPromptModel, ops
from softprompt_fast.prompt import SoftPrompt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _peers  # noqa: E402
from _bases import make_base  # noqa: E402

NAMES = ["sdpa", "sdpa-repeated", "flex", "flex-shared", "hydragen"]


def attention_inputs(queries: int, own: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Three rows, 6 query and 2 key heads of 16, 33 virtual tokens."""
    torch.manual_seed(0)
    query = torch.randn(3, queries, 6, 16).transpose(1, 2)
    key, value = torch.randn(2, 3, 2, 2 * own, 16)[:, :, :, :own]
    return tuple(x.to(dtype) for x in (query, key, value, *torch.randn(2, 2, 33, 16)))


def compiled_by(backend: Any) -> Any:
    return torch.compile(flex_attention, dynamic=False, backend=backend)


@pytest.mark.parametrize("queries, own", [(1, 7), (4, 7), (5, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_ours(name: str, queries: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peers, "compiled_flex_attention", lambda: compiled_by("eager"))
    inputs = attention_inputs(queries, own)
    expected = ops.prefix_attention(*inputs, backend="reference")
    peer = _peers.attention_peers()[name]
    with torch.no_grad():
        torch.testing.assert_close(peer.call(peer.prepare(inputs)), expected)


@pytest.mark.parametrize("name", ["flex", "flex-shared"])
def test_flex_attention_compiles_here(name: str) -> None:
    inputs = attention_inputs(4, 7)
    peer = _peers.attention_peers()[name]
    with torch.no_grad():
        found = peer.call(peer.prepare(inputs))
    torch.testing.assert_close(found, ops.prefix_attention(*inputs, backend="reference"))


def test_peers_are_named_and_the_slow_ones_known() -> None:
    assert list(_peers.attention_peers()) == [*NAMES, "flashinfer"]
    known = {*_peers.attention_peers(), *_peers.generation_peers(None, None, 1)}
    assert known >= _peers.SLOW


def test_flex_attention_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than torch.compile's limit, beyond which it runs the uncompiled function."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, unused: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(_peers, "compiled_flex_attention", functools.cache(lambda: compiled_by(backend)))
    peer = _peers.flex_attention(shared=False)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for own in (3, 5):
            inputs = attention_inputs(1, own)
            peer.call(peer.prepare(inputs))
    assert len(compiled) == 2


def test_hydragen_refuses_what_its_kernel_lacks() -> None:
    query = torch.empty(1, 2, 3, 16, device="meta")
    with pytest.raises(_peers.Unavailable, match="takes no mask"):
        _peers.partial_attention(query, query, query, torch.empty(3, 3, device="meta"))


def test_without_flashinfer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(_peers.Unavailable, match=r"flashinfer.*GPU"):
        _peers.flashinfer_cascade().prepare(attention_inputs(1, 7))


class PagedCascade:
    """What FlashInfer's cascade does, read off its documented tables, one sequence after the other."""

    def __init__(self, levels: int, workspace: Tensor, layout: str) -> None:
        assert (levels, layout) == (2, "NHD")

    def plan(self, *tables_and_sizes: Any, causal: bool, q_data_type: torch.dtype) -> None:
        *self.tables, self.heads, self.kv_heads, width, self.page = tables_and_sizes
        assert causal and (width, q_data_type) == (16, torch.float32)

    def run(self, query: Tensor, cache: Tensor) -> Tensor:
        assert cache.shape[1:] == (2, self.page, self.kv_heads, 16) and query.shape[1:] == (self.heads, 16)
        states = [self._level(query, cache, level) for level in (0, 1)]
        return ops.merge_states(*states[0], *states[1])[0].transpose(0, 1)

    def _level(self, query: Tensor, cache: Tensor, level: int) -> tuple[Tensor, Tensor]:
        starts, first, used, last = (table[level].tolist() for table in self.tables)
        outs, lses = [], []
        for i, full in enumerate(last):
            taken = cache[used[first[i] : first[i + 1]]]  # [n, 2, page, Hkv, D]
            length = (len(taken) - 1) * self.page + full
            key, value = taken.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, :length]
            rows = query[starts[i] : starts[i + 1]].transpose(0, 1)[None]
            nothing = key[None, :, :0]
            pair = (key[None], value[None], nothing[0], nothing[0]) if level else (nothing, nothing, key, value)
            out, lse = ops.prefix_attention(rows, *pair, return_lse=True, causal=level == 1, backend="reference")
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs, 1), torch.cat(lses, 1)


@pytest.mark.parametrize("queries, own", [(1, 7), (4, 16)])
def test_flashinfer_gets_the_right_tables(queries: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(MultiLevelCascadeAttentionWrapper=PagedCascade))
    inputs = attention_inputs(queries, own)
    peer = _peers.flashinfer_cascade()
    found = peer.call(peer.prepare(inputs))
    torch.testing.assert_close(found, ops.prefix_attention(*inputs, backend="reference"))


def test_generation_is_ours() -> None:
    torch.manual_seed(0)
    base = make_base("tiny", torch.device("cpu"), torch.float32)
    model = SoftPromptModel(base)
    model.add_prompt("p", SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=9))
    peers = _peers.generation_peers(base, model.compile_prompt("p"), new=5)
    ids = torch.randint(0, base.config.vocab_size, (3, 4))
    expected, times = _peers.greedy(model, ids, 5, prompt="p")
    assert expected.shape == (3, 5) and 0 < times["first token"] < times["total"]
    peers["static-compiled"].config.backend = "eager"  # inductor takes half a minute, and its results are PyTorch's
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, turn in peers.items():
        found, times = turn(ids)
        assert torch.equal(found, expected), name
        assert 0 < times["first token"] < times["total"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled and times["compile"] > 0
