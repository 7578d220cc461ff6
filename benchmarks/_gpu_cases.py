# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: what is measured on a GPU, against what, and how fast it has to be. bfloat16.

``smoke`` asks for the same rows at sizes that a CPU finishes at once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _bases import MODELS, make_base
from _first_layer import FirstLayer
from _first_layer import Shape as LayerShape
from _gpu import Bar, Case, Row, System
from _harness import ratio
from _peers import expanded, filled, flashinfer_cascade, flex_attention, generation_peers, hydragen, with_mask
from _prompts import make_peft, make_prompt, prompt_values
from _training import OURS, PEFT, Shape, Trainee
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from softprompt_fast import ops
from softprompt_fast.backends._registry import available_backends

DTYPE = torch.bfloat16
OVERHEAD = 3e-6
"""Seconds that a launch may take beside the transfer of its bytes."""
TRAINING_TOLERANCE = 3e-2
"""Of a gradient through all layers in bfloat16: PEFT's own is off by 1e-2 at 16 layers of width 512."""


@dataclass(frozen=True)
class Sizes:
    """Of an attention call; names as in the ops' contracts."""

    batch: int
    queries: int
    own: int
    prefix: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def flops(self) -> float:
        keys = self.prefix + self.own - (self.queries - 1) / 2
        return 4 * self.batch * self.q_heads * self.queries * keys * self.head_dim

    @property
    def moved(self) -> float:
        """Every input read and the result written once."""
        keys = self.kv_heads * (self.prefix + self.batch * self.own)
        return 2 * 2 * self.head_dim * (keys + self.batch * self.q_heads * self.queries)

    def __str__(self) -> str:
        return f"B{self.batch} S{self.queries} T{self.own} P{self.prefix}"


def randn(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(DTYPE)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value, prefix_key and prefix_value, laid out as a model hands them over: queries as a view of
    ``[B, S, Hq, D]``, own keys and values as the used part of a cache of twice their length."""
    s = sizes
    query = randn(s.batch, s.queries, s.q_heads, s.head_dim, device=device).transpose(1, 2)
    own = [randn(s.batch, s.kv_heads, 2 * s.own, s.head_dim, device=device)[:, :, : s.own] for _ in range(2)]
    return query, *own, *(randn(s.kv_heads, s.prefix, s.head_dim, device=device) for _ in range(2))


def sdpa(backend: SDPBackend | None, masked: bool) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """PyTorch's attention of the last S of the columns. cuDNN's own causal mask is that of the first S, so with
    several queries (``masked``) it gets one as a tensor."""

    def call(inputs: tuple[Tensor, ...]) -> Tensor:
        query, key, value, *mask = inputs
        queries, columns = query.shape[2], key.shape[2]
        bias = mask[0] if masked else causal_lower_right(queries, columns) if queries > 1 else None
        options: dict[str, Any] = {"attn_mask": bias, "enable_gqa": query.shape[1] != key.shape[1]}
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, **options)

    return call


def cudnn_twice(inputs: tuple[Tensor, ...]) -> Tensor:
    """cuDNN without a mask as a tensor: all queries against the prefix copies, causal against the own keys, merged."""
    query, own, prefix = inputs

    def attend(pair: tuple[Tensor, Tensor], causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, *pair, None, True, 0.0, causal)
        return out, lse.reshape(out.shape[:3])

    return ops.merge_states(*attend(prefix, False), *attend(own, True))[0]


def exact_rows(sizes: Sizes, rows: int = 2) -> tuple[Callable[[Any], Tensor], Callable[[Any], Any]]:
    """The reference in float32 of the first rows, and what cuts a result down to them."""
    rows = min(rows, sizes.batch)

    def reference(inputs: tuple[Tensor, ...]) -> Tensor:
        query, key, value, *prefix = (x.float() for x in inputs)
        return ops.prefix_attention(query[:rows], key[:rows], value[:rows], *prefix, backend="reference")

    return reference, lambda result: result[:rows]


def attention_systems(sizes: Sizes) -> dict[str, System]:
    """PyTorch's own over keys and values that hold the prefix for every row, as they are and repeated to all heads."""
    groups = sizes.q_heads // sizes.kv_heads
    masked = sizes.queries > 1

    def repeated(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return expanded(inputs, groups)

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    systems = {
        "flash, grouped heads": System(sdpa(flash, False), expanded),
        "flash, all heads": System(sdpa(flash, False), repeated),
        "cuDNN, grouped heads": System(
            sdpa(cudnn, masked), lambda x: with_mask(expanded(x)) if masked else expanded(x)
        ),
    }
    if not masked:
        systems["efficient, all heads"] = System(sdpa(SDPBackend.EFFICIENT_ATTENTION, False), repeated)
    return systems


def kernels(call: Callable[..., Any]) -> dict[str, System]:
    """``call(inputs, backend=...)`` on each of our backends of hand-written kernels: one of them is "ours"."""
    return {name: System(partial(call, backend=name.lower())) for name in ("Triton", "CUDA")}


def prefill(device: torch.device, smoke: bool) -> Iterator[Case]:
    s = Sizes(2, 8, 8, 16, 4, 2, 16) if smoke else Sizes(16, 512, 512, 512)
    reference, compare = exact_rows(s)

    def halves(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        query, key, value, *prefix = inputs
        return query, (key, value), tuple(p.expand(s.batch, -1, -1, -1).contiguous() for p in prefix)

    flash = sdpa(SDPBackend.FLASH_ATTENTION, False)
    systems = {"ours": System(lambda x: ops.prefix_attention(*x)), **attention_systems(s)}
    systems["cuDNN, twice and merged"] = System(cudnn_twice, halves)
    systems["flash, expand and cat counted"] = System(lambda x: flash(expanded(x)))
    systems["cuDNN, expand and cat counted"] = System(lambda x: cudnn_twice(halves(x)))
    systems["FlexAttention, packed"] = flex_attention(shared=True)
    if device.type == "cpu":
        systems["SDPA"] = System(sdpa(None, True), lambda x: with_mask(expanded(x)))
    yield Case(
        f"prefill {s}",
        lambda: attention_inputs(s, device),
        systems,
        s.flops,
        s.moved,
        reference,
        compare,
        bars=[
            Bar("TFLOP/s", lambda row: row.case.flops / row.seconds() / 1e12, at_least=450),
            Bar("x of flash", lambda row: row.speedup("flash, grouped", "flash, all"), at_least=1.2),
            Bar("x of cuDNN", lambda row: row.speedup("cuDNN, grouped", "cuDNN, twice"), at_least=0.8),
            Bar("x of the faster, expand counted", lambda row: row.speedup(*COUNTED), at_least=1.1),
            Bar("x of FlexAttention", lambda row: row.speedup("FlexAttention"), at_least=1.0),
        ],
    )


COUNTED = ("flash, expand", "cuDNN, expand")


def decode_backend() -> str | None:
    """What "ours" asks for in a decode step: the CUDA kernels where they are, which "auto" leaves out until they have
    run on a GPU."""
    return None if available_backends("prefix_attention")["cuda"] else "cuda"


SDPA = ("flash", "cuDNN", "efficient", "SDPA")


def decode(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Throughput behind a short, a middle and a long prefix, and the latency of few rows."""
    for batch, prefix, own, faster in ((64, 256, 128, None), (64, 1024, 128, 5.0), (64, 8192, 128, 25.0)):
        s = Sizes(3, 1, 8, prefix // 128, 4, 2, 16) if smoke else Sizes(batch, 1, own, prefix)
        case = decode_case(s, device)
        case.systems["Hydragen"], case.systems["FlashInfer cascade"] = System(hydragen), flashinfer_cascade()
        if importlib.util.find_spec("flashinfer") is None and device.type == "cuda":
            case.systems["FlexAttention, packed"] = flex_attention(shared=True)  # the last, for it compiles
        case.bars = [
            Bar("x of our Triton", of_triton, at_least=1.2),
            Bar("x of FlashInfer, else of FlexAttention and SDPA", of_library, at_least=1.1),
            Bar("times its floor", over_floor, at_most=1.25),
            Bar("Triton: times its floor", lambda row: over_floor(row, "Triton"), at_most=1.6),
        ]
        if faster is not None:
            case.bars.append(Bar("x of SDPA, expanded", lambda row: row.speedup(*SDPA), at_least=faster))
        yield case
    for batch in (1, 4):
        case = decode_case(Sizes(batch, 1, 8, 9, 4, 2, 16) if smoke else Sizes(batch, 1, 64, 128), device)
        case.bars = [Bar("x of SDPA, expanded", lambda row: row.speedup(*SDPA), at_least=1.1)]
        yield case


#: What a setting changes, and the rows and keys (B, P, T) where it might.
MANY = ((64, 256, 128), (64, 1024, 128), (64, 8192, 128))
FEW = ((1, 128, 64), (4, 128, 64), (16, 128, 128))
SETTINGS = {
    "SOFTPROMPT_FAST_CUDA_TILE": ("tiles of", MANY),
    "SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS": ("prefix blocks", MANY),
    "SOFTPROMPT_FAST_CUDA_LATE": ("merge items from shares of", MANY[2:]),
    "SOFTPROMPT_FAST_CUDA_TOGETHER": ("together up to", FEW),
}


def settings(device: torch.device, smoke: bool) -> Iterator[Case]:
    """The CUDA kernel with other choices than its own, which a process reads once from its environment."""
    given = [name for name in SETTINGS if name in os.environ]
    chosen = [f"{SETTINGS[name][0]} {os.environ[name]}" for name in given]
    for batch, prefix, own in SETTINGS[given[0]][1] if given else (*MANY, *FEW):
        s = Sizes(min(batch, 3), 1, own // 16, prefix // 128, 4, 2, 16) if smoke else Sizes(batch, 1, own, prefix)
        case = decode_case(s, device)
        case.name = ", ".join((f"decode {s}", *chosen))
        kept = ("ours", "mma.sync", "Triton")
        case.systems = {name: case.systems[name] for name in kept if name in case.systems}
        case.bars = [Bar("times its floor", over_floor, at_most=1.25)] if batch == 64 else []
        yield case


def decode_case(s: Sizes, device: torch.device) -> Case:
    """One query a row behind one prefix: ours, Triton's, and PyTorch's over the expanded cache."""
    asked = decode_backend()
    reference, compare = exact_rows(s, rows=16)
    systems = {
        "ours": System(lambda x: ops.prefix_attention(*x, backend=asked)),
        "Triton": System(lambda x: ops.prefix_attention(*x, backend="triton")),
        **attention_systems(s),
    }
    if asked == "cuda":
        systems["mma.sync"] = System(without_wgmma)
    if device.type == "cpu":
        systems["SDPA"] = System(sdpa(None, False), expanded)
    inputs = partial(attention_inputs, s, device)
    return Case(f"decode {s}", inputs, systems, s.flops, s.moved, reference, compare, backend=asked)


def without_wgmma(inputs: tuple[Tensor, ...]) -> Tensor:
    """The CUDA kernel whose products are a warp's each, as on GPUs that have no other."""
    from softprompt_fast.backends.cuda import _runtime

    before = _runtime._cuda.use_wgmma(False)
    try:
        return ops.prefix_attention(*inputs, backend="cuda")
    finally:
        _runtime._cuda.use_wgmma(before)


def of_library(row: Row) -> float:
    return row.speedup("FlashInfer") if "FlashInfer cascade" in row.samples else row.speedup("FlexAttention", *SDPA)


def of_triton(row: Row) -> float:
    return ratio(row.samples["Triton"], row.samples["ours"])["median"]


def over_floor(row: Row, name: str = "ours") -> float:
    """Seconds over those that the machine's measured rates ask for, and a launch's."""
    case, rates = row.case, row.ceilings
    floor = max(case.moved / rates["copy"], case.flops / rates["bf16 GEMM"])
    return row.seconds(name) / (floor + OVERHEAD)


def prompts(device: torch.device, smoke: bool) -> Iterator[Case]:
    """A decode step of 256 rows over 32 prompts of 64 to 2048 tokens, every 32nd row the same one."""
    rows, count, own, step = (6, 3, 8, 5) if smoke else (256, 32, 128, 64)
    heads, kv_heads, dim = (4, 2, 16) if smoke else (32, 8, 128)
    bounds = [0, *itertools.accumulate(step * (n + 1) for n in range(count))]
    runs, longest = list(itertools.pairwise(bounds)), step * count
    asked = decode_backend()
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    index = (torch.arange(rows, device=device) % count).int()

    def ours(inputs: tuple[Tensor, ...], backend: str | None) -> Tensor:
        options = {"prefix_offsets": offsets, "prefix_index": index, "max_prefix_length": longest}
        return ops.prefix_attention(*inputs, **options, backend=backend)

    def alone(inputs: tuple[Tensor, ...], backend: str | None, most: int = rows) -> list[Tensor]:
        """A call a prompt, of views of its rows."""
        own, prefix = inputs[:3], inputs[3:]
        return [
            ops.prefix_attention(*(x[n:most:count] for x in own), *(x[:, low:high] for x in prefix), backend=backend)
            for n, (low, high) in enumerate(runs)
        ]

    def padded(inputs: tuple[Tensor, ...], repeats: int = 1) -> tuple[Tensor, ...]:
        """Keys and values with each row's prompt before its own, padded on the left, and the mask of that."""
        query, *own, prefix_key, prefix_value = inputs
        pairs = []
        for x, pack in zip(own, (prefix_key, prefix_value), strict=True):
            wide = F.pad(x, (0, 0, longest, 0))
            for n, (low, high) in enumerate(runs):
                wide[n::count, :, longest - (high - low) : longest] = pack[:, low:high]
            pairs.append(wide.repeat_interleave(repeats, 1))
        hidden = torch.arange(pairs[0].shape[2], device=device) < longest - offsets.diff()[index.long(), None]
        return query, *pairs, torch.zeros_like(hidden, dtype=DTYPE).masked_fill(hidden, -math.inf)[:, None, None]

    def in_order(result: Any) -> Tensor:
        """The first row of every prompt."""
        return torch.stack(result, 1).flatten(0, 1)[:count] if isinstance(result, list) else result[:count]

    s = Sizes(rows, 1, own, bounds[-1], heads, kv_heads, dim)
    mean = Sizes(rows, 1, own, bounds[-1] // count, heads, kv_heads, dim)
    efficient = SDPBackend.EFFICIENT_ATTENTION
    systems = {
        "ours": System(partial(ours, backend=asked)),
        "Triton": System(partial(ours, backend="triton")),
        "ours, a call a prompt": System(partial(alone, backend=asked)),
        "Triton, a call a prompt": System(partial(alone, backend="triton")),
        "SDPA, padded": System(sdpa(None, True), padded),
        "cuDNN, padded": System(sdpa(SDPBackend.CUDNN_ATTENTION, True), padded),
        "efficient, padded, all heads": System(sdpa(efficient, True), partial(padded, repeats=heads // kv_heads)),
    }
    yield Case(
        f"decode of {count} prompts B{rows} T{own} P{step}..{longest}",
        lambda: attention_inputs(s, device),
        systems,
        mean.flops,
        s.moved,
        lambda x: in_order(alone(tuple(t.float() for t in x), "reference", count)),
        in_order,
        bars=[
            Bar("x of a call a prompt", lambda row: row.speedup("ours, a", "Triton, a"), at_least=3.0),
            Bar("x of SDPA, expanded", lambda row: row.speedup(*SDPA), at_least=4.0),
            Bar(
                "x of our Triton",
                lambda row: ratio(row.samples["Triton"], row.samples["ours"])["median"],
                at_least=1.0,
            ),
            Bar("times its floor", over_floor, at_most=1.6),
        ],
        backend=asked,
    )


def backward(device: torch.device, smoke: bool) -> Iterator[Case]:
    s = Sizes(2, 8, 8, 16, 4, 2, 16) if smoke else Sizes(16, 512, 512, 512)
    groups = s.q_heads // s.kv_heads

    def make() -> tuple[Tensor, ...]:
        inputs = attention_inputs(s, device)
        return *inputs, randn(s.batch, s.queries, s.q_heads, s.head_dim, device=device).transpose(1, 2)

    def recorded(forward: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            return forward(leaves), leaves, grad

    def ours(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return recorded(lambda x: ops.prefix_attention(*x), inputs[:5], inputs[5])

    def flash(repeats: int) -> Callable[[tuple[Tensor, ...]], tuple[Any, ...]]:
        call = sdpa(SDPBackend.FLASH_ATTENTION if device.type == "cuda" else None, False)
        return lambda inputs: recorded(call, expanded(inputs[:5], repeats), inputs[5])

    def gradients(prepared: tuple[Any, ...]) -> list[Tensor]:
        out, leaves, grad = prepared
        return list(torch.autograd.grad(out, leaves, grad, retain_graph=True))

    def folded(grads: list[Tensor]) -> list[Tensor]:
        """dQ, dK and dV of own keys, of the prefix; from gradients of expanded keys and values by summing copies."""
        if len(grads) == 5:
            return grads
        pairs = [g.float().unflatten(1, (s.kv_heads, -1)).sum(2).split([s.prefix, s.own], 2) for g in grads[1:]]
        return [grads[0], *(own for _, own in pairs), *(copies.sum(0) for copies, _ in pairs)]

    def reference(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        exact = tuple(x.float() for x in inputs)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            query, key, value, mask = with_mask(expanded(exact[:5], groups))
            prepared = recorded(lambda x: F.scaled_dot_product_attention(*x, mask), (query, key, value), exact[5])
            return folded(gradients(prepared))

    def at_once(prepare: Callable[[Any], Any]) -> System:
        # Autograd records its own streams, so no graph; a turn's launches run ahead of the device all the same.
        return System(gradients, prepare, graph=False)

    yield Case(
        f"backward {s}",
        make,
        {
            "ours": at_once(ours),
            "flash, grouped heads": at_once(flash(1)),
            "flash, all heads": at_once(flash(groups)),
        },
        2.5 * s.flops,
        3 * s.moved,
        reference,
        folded,
        tolerance=2e-2,
        bars=[Bar("x of flash's backward", lambda row: row.speedup("flash"), at_least=1.1)],
    )


# -- the other ops ----------------------------------------------------------------------------------------------------


def merge_states(device: torch.device, smoke: bool) -> Iterator[Case]:
    shapes = [(2, 4, 3, 16)] if smoke else [(64, 32, 1, 128), (16, 32, 512, 128)]

    def plain(states: tuple[Tensor, ...]) -> Tensor:
        out_a, lse_a, out_b, lse_b = states
        weight = torch.sigmoid(lse_a - lse_b)[..., None]
        return (out_a * weight + out_b * (1 - weight)).to(out_a.dtype)

    for shape in shapes:

        def make(shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            states = []
            for _ in range(2):
                states += [randn(*shape, device=device), torch.randn(shape[:-1], device=device)]
            return tuple(states)

        values = math.prod(shape)
        yield Case(
            f"merge_states {'x'.join(map(str, shape))}",
            make,
            {
                "ours": System(lambda x: ops.merge_states(*x)[0]),
                **kernels(lambda x, backend: ops.merge_states(*x, backend=backend)[0]),
                "PyTorch": System(plain),
                "PyTorch, compiled": System(torch.compile(plain, dynamic=False)),
            },
            moved=3 * (2 * values + 4 * values / shape[-1]),
            reference=lambda x: ops.merge_states(*(t.float() for t in x), backend="reference")[0],
        )


def prompt_concat(device: torch.device, smoke: bool) -> Iterator[Case]:
    batch, virtual, own, width, vocabulary = (2, 3, 4, 16, 11) if smoke else (64, 128, 512, 4096, 128256)
    table = randn(vocabulary, width, device=device)

    def make() -> tuple[Tensor, Tensor]:
        return torch.randint(0, vocabulary, (batch, own), device=device), randn(virtual, width, device=device)

    def steps(inputs: tuple[Tensor, Tensor]) -> Tensor:
        tokens, prompt = inputs
        return torch.cat([prompt.expand(batch, -1, -1), F.embedding(tokens, table)], 1)

    def train(inputs: tuple[Tensor, Tensor], call: Callable[..., Tensor]) -> Tensor:
        prompt = inputs[1].detach().requires_grad_()
        with torch.enable_grad():
            out = call((inputs[0], prompt))
            return torch.autograd.grad(out, prompt, out.detach())[0]

    def ours(inputs: tuple[Tensor, Tensor], backend: str | None = None) -> Tensor:
        return ops.prompt_concat(inputs[0], table, inputs[1], backend=backend)

    yield Case(
        f"prompt_concat B{batch} P{virtual} S{own} H{width}",
        make,
        {
            "ours": System(ours),
            **kernels(ours),
            "embedding, expand, cat": System(steps),
            "the same, compiled": System(torch.compile(steps, dynamic=False)),
        },
        moved=2 * width * (2 * batch * own + virtual + batch * virtual),
        reference=lambda x: steps(x).float(),
        tolerance=0.0,
        bars=[
            Bar("x of embedding, expand, cat", lambda row: row.speedup("embedding"), at_least=1.8),
            Bar("of copy bandwidth", lambda row: row.case.moved / row.seconds() / row.ceilings["copy"], at_least=0.85),
        ],
    )
    yield Case(
        "prompt_concat, forward and backward",
        make,
        {
            "ours": System(lambda x: train(x, ours), graph=False),
            "embedding, expand, cat": System(lambda x: train(x, steps), graph=False),
        },
        moved=2 * width * (2 * batch * own + virtual + 2 * batch * virtual),
        reference=lambda x: steps(x)[:, :virtual].float().sum(0),
    )


def prompt_qkv(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Llama-3.1-8B's first layer: with the gather prologue, and a decode step over plain hidden states."""
    width, q_heads, kv_heads, dim, vocabulary = (16, 4, 2, 8, 11) if smoke else (4096, 32, 8, 128, 128256)
    heads = q_heads, kv_heads, kv_heads
    weight = randn(sum(heads) * dim, width, device=device, scale=width**-0.5)
    norm = 1 + randn(width, device=device, scale=0.1)
    table = randn(vocabulary, width, device=device)

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def layer(hidden: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        wide = hidden.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype) * norm
        projected = F.linear(normed, weight).unflatten(-1, (sum(heads), dim)).transpose(1, 2)
        query, key, value = projected.split(heads, 1)
        return rotated(query, cos[:, None], sin[:, None]), rotated(key, cos[:, None], sin[:, None]), value, hidden

    def first_layer(tokens: Tensor, cos: Tensor, sin: Tensor, prompt: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.cat([prompt.expand(len(tokens), -1, -1), F.embedding(tokens, rest[0])], 1)
        return layer(hidden, cos, sin, *rest[1:])

    def angles(length: int) -> list[Tensor]:
        angle = torch.rand(1, length, dim // 2, device=device).repeat(1, 1, 2) * 6.3
        return [angle.cos().to(DTYPE), angle.sin().to(DTYPE)]

    options: dict[str, Any] = {"q_heads": q_heads, "kv_heads": kv_heads, "norm_weight": norm}
    plans = [("first layer", 2, 3, 4), ("decode", 3, 0, 1)] if smoke else FIRST_LAYER
    for name, batch, virtual, own in plans:

        def make(batch: int = batch, virtual: int = virtual, own: int = own) -> dict[str, Tensor]:
            cos, sin = angles(virtual + own)
            if not virtual:
                return {"tokens": randn(batch, own, width, device=device), "cos": cos, "sin": sin}
            tokens = torch.randint(0, vocabulary, (batch, own), device=device)
            return {"tokens": tokens, "cos": cos, "sin": sin, "prompt": randn(virtual, width, device=device)}

        def ours(x: dict[str, Tensor], **how: Any) -> tuple[Tensor, ...]:
            more = {"table": table} if "prompt" in x else {}
            return ops.prompt_qkv(**x, weight=weight, **options, **more, **how)

        def by_name(form: str, ours: Callable[..., Any] = ours) -> System:
            """Triton's ``one_kernel`` or ``composed``, whichever would be picked."""

            def call(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
                module: Any = importlib.import_module("softprompt_fast.backends.triton.prompt_qkv")
                chosen = getattr(module, form)
                with mock.patch.multiple(module, one_kernel=chosen, composed=chosen):
                    return ours(x, backend="triton")

            return System(call)

        def reference(x: dict[str, Tensor]) -> list[Tensor]:
            exact = {name: t.float() if t.is_floating_point() else t for name, t in x.items()}
            more = {"table": table.float()} if "prompt" in x else {}
            parameters = {"weight": weight.float(), **options, "norm_weight": norm.float()}
            return list(ops.prompt_qkv(**exact, **parameters, **more, backend="reference"))

        def steps(x: dict[str, Tensor], call: Callable[..., Any]) -> tuple[Tensor, ...]:
            if "prompt" in x:
                return call(x["tokens"], x["cos"], x["sin"], x["prompt"], table, norm, weight)
            return call(x["tokens"], x["cos"], x["sin"], norm, weight)

        plain = first_layer if virtual else layer
        compiled = torch.compile(plain, dynamic=False)
        count = batch * (virtual + own)
        written = count * (sum(heads) * dim + width)
        yield Case(
            f"prompt_qkv {name} B{batch} P{virtual} S{own}",
            make,
            {
                "ours": System(ours),
                "Triton, one kernel": by_name("one_kernel"),
                "Triton, composed": by_name("composed"),
                "CUDA": System(partial(ours, backend="cuda")),
                "PyTorch": System(lambda x, plain=plain, steps=steps: steps(x, plain)),
                "PyTorch, compiled": System(lambda x, compiled=compiled, steps=steps: steps(x, compiled)),
            },
            flops=2 * count * sum(heads) * dim * width,
            moved=2 * (sum(heads) * dim * width + count * width + written),
            reference=reference,
            tolerance=2e-2,
            bars=[
                Bar(
                    "x of PyTorch, compiled",
                    lambda row: row.speedup("PyTorch, comp"),
                    at_least=1.1 if virtual else 1.3,
                )
            ],
        )


# The short prompt is few enough rows for one kernel from token ids to q, k and v.
FIRST_LAYER = [("first layer", 32, 128, 128), ("first layer", 1, 100, 16), ("decode", 64, 0, 1)]
TO_ATTENTION = {"decode": (64, 1, 1024, 127), "one row's prefill": (1, 16, 100, 0), "prefill": (32, 128, 128, 0)}
"""Rows, new tokens, virtual tokens and cached own ones."""


def first_layers(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Llama-3.1-8B's first layer end to end, from token ids and the prompt to attention's result. "ours": the ops as
    "auto" picks them, and a copy into the cache. "CUDA": the fused step, where 128 rows at most are one launch."""
    sizes = (16, 11, 4, 2, 8) if smoke else (4096, 128256, 32, 8, 128)
    small = {"decode": (3, 1, 5, 3), "one row's prefill": (1, 4, 3, 0)}
    for name, counts in (small if smoke else TO_ATTENTION).items():
        shape = LayerShape(*counts, *sizes)
        layer = FirstLayer(shape, device, DTYPE)
        exact = layer.widened(torch.float32)

        def reference(inputs: dict[str, Tensor], exact: FirstLayer = exact) -> tuple[Tensor, ...]:
            wide = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
            return exact.operators(exact.with_copies(wide))

        systems = {"ours": System(layer.ours), "CUDA": System(partial(layer.ours, backend="cuda"))}
        if not shape.past:
            systems["ours, prompt in every row"] = System(layer.concatenated)
            systems["CUDA, prompt in every row"] = System(partial(layer.concatenated, backend="cuda"))
        systems["PyTorch"] = System(layer.operators, layer.with_copies)
        compiled = torch.compile(layer.operators, dynamic=False)
        systems["PyTorch, compiled"] = System(compiled, layer.with_copies)
        yield Case(
            f"first layer to attention, {name} {shape}",
            layer.make,
            systems,
            shape.flops,
            2 * shape.numbers,
            reference,
            tolerance=2e-2,
            bars=[
                Bar("x of PyTorch, compiled", lambda row: row.speedup("PyTorch, comp"), at_least=1.3),
                Bar(
                    "CUDA: x of PyTorch, compiled",
                    lambda row: row.seconds("PyTorch, compiled") / min(map(row.seconds, cuda_systems(row))),
                    at_least=1.3,
                ),
            ],
        )


def cuda_systems(row: Row) -> list[str]:
    """Those on our CUDA kernels that were timed; KeyError where there is none."""
    if not (found := [name for name in row.samples if name.startswith("CUDA")]):
        raise KeyError("CUDA")
    return found


# -- whole models -----------------------------------------------------------------------------------------------------


def models(device: torch.device, smoke: bool) -> Iterator[Case]:
    """``generate`` behind a shared prefix, against transformers' own behind a cache that holds it for every row;
    random weights."""
    for name in (name for name in MODELS if not name.startswith("SmolLM2")):  # those are a CPU's
        base = make_base(name, device, DTYPE, tiny=smoke)
        yield from model_cases(name, base, *((2, 3, 4, 2) if smoke else (32, 512, 16, 32)))
        del base
        torch.compiler.reset()


def model_cases(name: str, base: Any, batch: int, virtual: int, own: int, new: int) -> Iterator[Case]:
    """Of one model. Random weights decide between tokens by less than the noise of bfloat16, so texts are not
    compared: logits are."""
    from transformers import DynamicCache

    from softprompt_fast import SoftPromptModel
    from softprompt_fast.prompt import SoftPrompt

    model = SoftPromptModel(base)
    model.add_prompt(
        "p", SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=virtual).requires_grad_(False)
    )
    prefix = model.compile_prompt("p")
    sizes = f"B{batch} P{virtual} S{own}"

    def make() -> Tensor:
        return torch.randint(0, base.config.vocab_size, (batch, own), device=base.device)

    def cached() -> dict[str, Any]:
        """A cache that holds the prefix for every row; its expansion is counted, as every request pays it."""
        mask = torch.ones(batch, virtual + own, dtype=torch.long, device=base.device)
        return {"past_key_values": filled(DynamicCache(), prefix, batch), "attention_mask": mask}

    def expanded_logits(ids: Tensor) -> Tensor:
        return base(ids, **cached(), logits_to_keep=1).logits

    def logits(ids: Tensor) -> Tensor:
        return model(ids, prompt="p", logits_to_keep=1, use_cache=False).logits

    yield Case(
        f"{name}: logits of a prefill, {sizes}",
        make,
        {"ours": System(logits, graph=False), "transformers, expanded": System(expanded_logits, graph=False)},
        reference=expanded_logits,
        tolerance=5e-2,
        seconds=4.0,
    )
    yield step_case(name, model, batch, virtual, own)
    for tokens, what in ((1, "first token"), (new, f"{new} tokens")):
        greedy = {"max_new_tokens": tokens, "do_sample": False}
        static = {**greedy, "cache_implementation": "static"}
        systems = {
            "ours": System(lambda x, how=greedy: model.generate(x, prompt="p", **how), graph=False),
            "transformers, expanded": System(lambda x, how=greedy: base.generate(x, **cached(), **how), graph=False),
        }
        if tokens > 1 and name == "Llama-3.2-1B":  # compiling takes half a minute or more
            systems["ours, static cache, compiled"] = System(
                lambda x, how=static: model.generate(x, prompt="p", **how), graph=False
            )
        yield Case(f"{name}: generate, {what}, {sizes}", make, systems, seconds=7.0)


def generate(device: torch.device, smoke: bool) -> Iterator[Case]:
    """128 tokens behind a shared prompt against PEFT, and against transformers with a static cache that holds the
    prompt for every row, its decode step compiled into CUDA graphs as ours is."""
    for virtual, of_peft, of_static in ((512, 10.0, 1.2), (4096, 15.0, 2.5)):
        case = generate_case("tiny", 2, virtual // 128, 4, 3, device) if smoke else None
        case = case or generate_case("Llama-3.2-1B", 64, virtual, 32, 128, device)
        case.bars = [
            Bar("x of PEFT", lambda row: row.speedup("PEFT"), at_least=of_peft),
            Bar("x of a static cache, compiled", lambda row: row.speedup("transformers, st"), at_least=of_static),
        ]
        yield case
        del case
        torch.compiler.reset()


def generate_case(name: str, batch: int, virtual: int, own: int, new: int, device: torch.device) -> Case:
    """Random weights, so texts are not compared: "models" has the logits."""
    from softprompt_fast import SoftPromptModel

    asked = decode_backend()
    base, untouched = (make_base(name, device, DTYPE) for _ in range(2))
    for each in (base, untouched):
        each.generation_config.eos_token_id, each.generation_config.pad_token_id = None, 0
    vocabulary = base.get_input_embeddings().num_embeddings
    values = prompt_values(base, virtual, 0)
    model = SoftPromptModel(base, backend=asked).eval()
    model.add_prompt("shared", make_prompt(base, values))
    peers = generation_peers(untouched, model.compile_prompt("shared"), new)
    peft = make_peft(untouched, {"shared": values.to(DTYPE)})  # which wraps the base and leaves it as it is
    ones = torch.ones(batch, own, dtype=torch.long, device=device)
    greedy: dict[str, Any] = {"attention_mask": ones, "max_new_tokens": new, "do_sample": False}
    systems: dict[str, Callable[[Tensor], Any]] = {
        "ours": lambda ids: model.generate(ids, prompt="shared", cache_implementation="static", **greedy),
        "PEFT": lambda ids: peft.generate(input_ids=ids, **greedy),
        "transformers, static, compiled": lambda ids: peers["static-compiled"](ids)[0],
        "transformers, expanded": lambda ids: peers["expanded"](ids)[0],
    }
    return Case(
        f"{name}: generate {new} tokens, B{batch} P{virtual} S{own}",
        lambda: torch.randint(0, vocabulary, (batch, own), device=device),
        {system: System(call, graph=False) for system, call in systems.items()},
        seconds=90.0,
        backend=asked,
    )


def step_case(name: str, model: Any, batch: int, virtual: int, own: int) -> Case:
    """A decode step of all layers, in a graph but for transformers' own: its modules around our attention ("ours"),
    and backend "cuda", which fuses the step. Every call steps back first."""
    from transformers import DynamicCache

    from softprompt_fast import SoftPromptModel
    from softprompt_fast.cache import make_static_cache

    base = model.base
    prefix = model.compile_prompt("p")
    ids = torch.randint(0, base.config.vocab_size, (batch, own), device=base.device)

    def stepping(model: Any) -> System:
        selected = model._select("p", None, batch)
        cache = make_static_cache(base.config.num_hidden_layers, own + 8)
        options = {"prompt": selected.packed, "prompt_index": selected.index, "past_key_values": cache}
        model(ids, use_cache=True, **options)
        lengths = [layer.cumulative_length for layer in cache.layers]
        before = [length.clone() for length in lengths]

        def step(token: Tensor) -> Tensor:
            torch._foreach_copy_(lengths, before)
            return model(token, use_cache=True, **options).logits

        return System(step)

    def on_cuda_kernels() -> System:
        cuda = SoftPromptModel(base, backend="cuda")
        cuda.add_prompt("p", prefix)
        return stepping(cuda)

    def expanded_cache() -> DynamicCache:
        cache = filled(DynamicCache(), prefix, batch)
        base(ids, past_key_values=cache, attention_mask=visible(virtual + own))
        return cache

    def visible(columns: int) -> Tensor:
        return torch.ones(batch, columns, dtype=torch.long, device=base.device)

    def step_expanded(prepared: tuple[Tensor, DynamicCache]) -> Tensor:
        token, cache = prepared
        logits = base(token, past_key_values=cache, attention_mask=visible(virtual + own + 1)).logits
        cache.crop(-1)
        return logits

    return Case(
        f"{name}: a decode step, B{batch} P{virtual} T{own + 1}",
        lambda: torch.randint(0, base.config.vocab_size, (batch, 1), device=base.device),
        {
            "ours": stepping(model),
            "CUDA": deferred(on_cuda_kernels),
            "transformers, expanded": System(step_expanded, lambda token: (token, expanded_cache()), graph=False),
        },
        reference=lambda token: step_expanded((token, expanded_cache())),
        tolerance=5e-2,
        bars=[Bar("CUDA, fused: x of ours", lambda row: 1 / row.speedup("CUDA"), at_least=1.1)],
        seconds=6.0,
    )


def deferred(make: Callable[[], System]) -> System:
    """A system that is made when it is first prepared, where what it lacks is a reason and no end."""
    made: list[System] = []

    def prepare(inputs: Any) -> Any:
        made.extend([] if made else [make()])
        return made[0].prepare(inputs)

    return System(lambda prepared: made[0].call(prepared), prepare)


def training(device: torch.device, smoke: bool) -> Iterator[Case]:
    """A step of prompt tuning: PEFT's with the prompt in every row, at once and in micro-batches, as the logits of a
    whole batch may not fit."""
    for virtual, faster in ((128, 1.9), (1024, 5.0)):
        shape = Shape(2, virtual // 32, 3) if smoke else Shape(32, virtual, 128)
        yield training_case("tiny" if smoke else "Llama-3.2-1B", shape, faster, device)


def training_case(name: str, shape: Shape, faster: float, device: torch.device) -> Case:
    ours, peft = (Trainee.make(system, name, shape, device, DTYPE) for system in (OURS, PEFT))
    vocabulary = ours.model.get_input_embeddings().num_embeddings
    weights = sum(p.numel() for p in ours.model.base.parameters() if p.dim() == 2)

    def step(trainee: Trainee, micro_batches: int = 1) -> System:
        def call(ids: Tensor) -> Tensor:
            with torch.enable_grad():
                return trainee.step(ids, shape, micro_batches)[0]

        return System(call, graph=False)

    def reference(ids: Tensor) -> list[Tensor]:
        """PEFT's own in float32, row by row."""
        exact = copy.deepcopy(peft.model).float()
        trainee = Trainee(PEFT, exact, [p for p in exact.parameters() if p.requires_grad])
        return apart(step(trainee, shape.batch).call(ids))

    def apart(result: Tensor) -> list[Tensor]:
        """Loss and gradients: as one vector, the larger of the two would hide the other."""
        return [result[:1], result[1:]]

    systems = {"ours": step(ours), "PEFT": step(peft)}
    systems |= {f"PEFT, {n} micro-batches": step(peft, n) for n in (2, 4)}
    return Case(
        f"{name}: {shape}",
        lambda: torch.randint(0, vocabulary, (shape.batch, shape.own), device=device),
        systems,
        # Forward and the gradient of every product's input; no weight has a gradient.
        4 * weights * (shape.virtual_tokens + shape.batch * shape.own),
        reference=reference,
        compare=apart,
        tolerance=TRAINING_TOLERANCE,
        bars=[Bar("x of PEFT", lambda row: row.speedup("PEFT"), at_least=faster)],
        seconds=14.0,
    )


CASES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "prefill": prefill,
    "decode": decode,
    "prompts": prompts,
    "settings": settings,
    "backward": backward,
    "prompt_concat": prompt_concat,
    "prompt_qkv": prompt_qkv,
    "first_layer": first_layers,
    "merge_states": merge_states,
    "models": models,
    "generate": generate,
    "training": training,
}
