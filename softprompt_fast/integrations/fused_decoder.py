# SPDX-License-Identifier: Apache-2.0
"""A llama-like decoder's inference pass in four C++ calls a layer, without transformers' modules in between.

Which bases it serves is no list of names. A base is recognised by its structure (the layers' children and what its
norms and activation compute) and then has to prove it: base and fused pass run a few tokens, and where the logits
differ (multipliers, other rotations, layers without positions, ...) the base keeps its own pass.

What is read off the base once may not change later: hooks, replaced layers and changed weights are noticed before
every pass (:meth:`FusedDecoder.why_not_now`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import requested
from softprompt_fast.bank import optimizer_steps
from softprompt_fast.cache import GrowingLayer, OwnTokenCache, extend
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.ops._checks import check_index, check_offsets, check_range

logger = logging.getLogger("softprompt_fast")

#: 1: pack weights however little memory is left; 0: never, and so fuse nothing.
PACK_VARIABLE = "SOFTPROMPT_FAST_PACK_WEIGHTS"

_SLEEPING = "transformers.utils.output_capturing"
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class _UnservedError(Exception):
    """A base that the fused decoder can't serve; the message says why."""


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, ready for the kernels (``PackedLinear`` and ``Norm`` of ``backends/cpu/_linear.py``)."""

    norm: Any
    qkv: Any
    q_norm: Any
    k_norm: Any
    output: Any
    mlp_norm: Any
    gate_up: Any
    down: Any
    scale: float
    sliding_window: int | None
    softcap: float | None


class FusedDecoder:
    """The inference pass of one base, from embeddings to logits; :func:`plan` makes it.

    Args:
        base: a base of the structure described above, float32 on the CPU.
        asked: what each layer asks of attention (``PrefixContext.options``).

    Raises:
        _UnservedError: another structure.
        ImportError: the C++ extension is not there.
    """

    def __init__(self, base: PreTrainedModel, asked: Mapping[int, Mapping[str, Any]]) -> None:
        from softprompt_fast.backends.cpu import _linear, prefix_attention, prompt_qkv

        self._linear, self._gated_mlp = _linear.linear, _linear.gated_mlp
        self._into_cache = prompt_qkv.into_cache
        self._attend: Callable[..., tuple[Tensor, Tensor]] = prefix_attention.forward
        self._state = _BaseState(base)
        decoder: Any = base.model
        self.embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        first = decoder.layers[0].self_attn
        self._head_dim = int(first.head_dim)
        self._q_heads = first.q_proj.out_features // self._head_dim
        self._kv_heads = first.k_proj.out_features // self._head_dim
        self._activation = _activation(decoder.layers[0].mlp.act_fn)
        self._packed_bytes = 0

        def packed(*linears: nn.Linear, heads: Sequence[int] | None = None) -> Any:
            weights = _linear.PackedLinear([m.weight for m in linears], [m.bias for m in linears], heads=heads)
            self._packed_bytes += weights.nbytes
            return weights

        def layer(module: Any, asked: Mapping[str, Any]) -> _Layer:
            attention, mlp = module.self_attn, module.mlp
            if asked["s_aux"] is not None:
                raise _UnservedError("its attention has sinks")
            found = [getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")]
            heads = (self._q_heads, self._kv_heads, self._kv_heads)
            if found != [count * self._head_dim for count in heads]:
                raise _UnservedError("its layers' heads differ")
            if _activation(mlp.act_fn) != self._activation:
                raise _UnservedError("its layers' activations differ")
            normed = hasattr(attention, "q_norm")
            return _Layer(
                norm=_norm(module.input_layernorm),
                qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj, heads=heads),
                q_norm=_norm(attention.q_norm, self._head_dim) if normed else None,
                k_norm=_norm(attention.k_norm, self._head_dim) if normed else None,
                output=packed(attention.o_proj),
                mlp_norm=_norm(module.post_attention_layernorm),
                gate_up=packed(mlp.gate_proj, mlp.up_proj),
                down=packed(mlp.down_proj),
                scale=float(self._head_dim**-0.5 if asked["scaling"] is None else asked["scaling"]),
                sliding_window=asked["sliding_window"],
                softcap=asked["softcap"],
            )

        self._layers = [layer(module, asked[i]) for i, module in enumerate(decoder.layers)]
        self._norm, self._head = _norm(decoder.norm), packed(base.lm_head)
        self._no_prefix = decoder.embed_tokens.weight.new_empty(self._kv_heads, 0, self._head_dim)

    def why_not_now(self) -> str | None:
        """Why the base no longer computes what was planned; None where it does. Some tens of microseconds."""
        return self._state.changed()

    def why_not_these(self, embeds: Tensor | None, prefix: Sequence[Tensor], quantized: bool = False) -> str | None:
        """Why the kernels, which trust their pointers, can't take a call's embeddings and prefixes; None: they can."""
        given = prefix if embeds is None else [embeds, *prefix]
        kinds = {id(x): torch.int8 for x in prefix} if quantized else {}
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *self._state.parameters)):
            return "the call is differentiated"
        for x in given:
            if (
                x.dtype != kinds.get(id(x), torch.float32)
                or x.device.type != "cpu"
                or type(x) not in (Tensor, nn.Parameter)
            ):
                return f"it takes float32 tensors on the CPU, found {type(x).__name__} of {x.dtype} on {x.device}"
        if embeds is not None and embeds.shape[2] != self._norm.weight.shape[0]:
            return f"its embeddings have {self._norm.weight.shape[0]} features, found {embeds.shape[2]}"
        if prefix and any(x.shape != (self._kv_heads, prefix[0].shape[1], self._head_dim) for x in prefix):
            return f"a prefix has {self._kv_heads} heads of {self._head_dim}, found another shape"
        return None

    def __str__(self) -> str:
        return f"fused decoder, packed weights {self._packed_bytes / 1e6:.0f} MB"

    def __call__(
        self,
        hidden: Tensor,
        positions: Tensor,
        context: hooks.PrefixContext,
        cache: Cache | None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """One pass over own tokens behind their prefixes.

        Args:
            hidden: float32 ``[B, S, H]`` embeddings; left as they are.
            positions: int64 ``[1 or B, S]``.
            context: the prefixes and each row's range of own tokens.
            cache: own tokens so far, of layers that :func:`softprompt_fast.cache.extend` knows; S more are appended.
            logits_to_keep: as in transformers: the last ones, 0 for all, or an index of columns.

        Returns:
            Logits ``[B, kept, V]``.

        Raises:
            ValueError: the shape of `positions`, or a value in `context`, does not fit.
        """
        batch, length, width = hidden.shape
        if positions.shape not in ((1, length), (batch, length)):
            raise ValueError(f"position_ids: expected shape {(batch, length)}, found {tuple(positions.shape)}")
        cos, sin = self._rotary(hidden, positions)
        cos, sin = cos.contiguous(), sin.contiguous()
        x = hidden.reshape(batch * length, width).clone()  # the residual stream, which every layer adds to in place
        shape = (batch, self._kv_heads, length, self._head_dim)
        scratch = GrowingLayer(length)
        rows: tuple[Tensor | None, ...] | None = None
        for i, layer in enumerate(self._layers):
            own = scratch if cache is None else cache.layers[i]
            new_keys, new_values, keys, values = extend(own, x, shape, self._head_dim)
            prefix_keys = self._no_prefix if context.keys is None else context.keys[i]
            prefix_values = self._no_prefix if context.values is None else context.values[i]
            if rows is None:
                rows = _checked_rows(context, batch, keys.shape[2], prefix_keys.shape[1])
            query = self._into_cache(
                x.view(batch, length, width),
                layer.norm,
                layer.qkv,
                self._q_heads,
                self._kv_heads,
                cos,
                sin,
                new_keys,
                new_values,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
            )
            if i == len(self._layers) - 1 and isinstance(logits_to_keep, int) and 0 < logits_to_keep < length:
                # Behind the last layer's keys and values only the positions that give logits matter.
                query = query[:, :, length - logits_to_keep :]
                x = x.view(batch, length, width)[:, length - logits_to_keep :].reshape(-1, width).contiguous()
                if rows[-1] is not None:
                    rows = (*rows[:-1], rows[-1] + (length - logits_to_keep))
            attended, _ = self._attend(
                query,
                keys,
                values,
                prefix_keys,
                prefix_values,
                *rows,
                layer.scale,
                True,
                layer.sliding_window,
                layer.softcap,
                None,
                None,
                *(() if context.scales is None else context.scales.of_layer(i)),
            )
            x = self._linear(attended.transpose(1, 2).reshape(x.shape[0], -1), layer.output, residual=x)
            x = self._gated_mlp(x, layer.mlp_norm, layer.gate_up, layer.down, self._activation, x)
            if cache is None:
                scratch.crop(-length)
        if isinstance(logits_to_keep, Tensor):
            x = x.view(batch, length, width)[:, logits_to_keep].reshape(-1, width)
        logits = self._linear(x, self._head, norm=self._norm)
        return logits.view(batch, -1, self._head.out_features)


def _checked_rows(context: hooks.PrefixContext, batch: int, own: int, packed: int) -> tuple[Tensor | None, ...]:
    """The context's index tensors, dense and with their values checked: once a pass instead of once a layer."""
    device = torch.device("cpu")
    names = ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start")
    rows = [getattr(context, name) for name in names]
    for name, index in zip(names, rows, strict=True):
        check_index(name, index, None if name == "prefix_offsets" else batch, device)
    offsets, prefix_index, own_start, own_end, _ = rows
    prefixes, _ = check_offsets("prefix_offsets", offsets, packed)
    check_range("prefix_index", prefix_index, -1, prefixes - 1)
    check_range("own_start", own_start, 0, own)
    check_range("own_end", own_end, 0, own)
    return tuple(None if index is None else index.contiguous() for index in rows)


class _BaseState:
    """What must stay as it was when a base was planned, held so that comparing takes microseconds."""

    def __init__(self, base: PreTrainedModel) -> None:
        modules = list(base.modules())
        self._config = base.config
        self._attributes = [module.__dict__ for module in modules]
        self._hooks = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._tables = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        self.parameters = [table[name] for table, name in self._tables]
        # Inference tensors have no version counter; nothing but inference mode can write to them.
        self._counted = [p for p in self.parameters if not p.is_inference()]
        self._drops_out = _has_dropout(base)
        self._weights = self._read_weights()

    def _read_weights(self) -> tuple[Any, ...]:
        # Fused optimizers write without counting versions, and `.data =` moves a parameter without counting either.
        steps = optimizer_steps() if any(p.requires_grad for p in self.parameters) else 0
        return steps, [p.data_ptr() for p in self.parameters], [p._version for p in self._counted]

    def _is_hooked(self) -> bool:
        # Once asked for hidden states, transformers leaves its hooks in place; they sleep until it is asked again.
        tables = [table for table in self._hooks if table]
        return any(getattr(hook, "__module__", "") != _SLEEPING for table in tables for hook in table.values())

    def changed(self) -> str | None:
        """What changed, in words; None if nothing did."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or self._is_hooked():
            return "a module of the base has forward hooks"
        if any("forward" in attributes for attributes in self._attributes):
            return "a module of the base has a forward of its own"
        if any(table != children for table, children in self._children):
            return "modules of the base were replaced"
        if any(table.get(name) is not p for (table, name), p in zip(self._tables, self.parameters, strict=True)):
            return "parameters of the base were replaced"
        if self._read_weights() != self._weights:
            return "the base's weights changed since they were read; call invalidate()"
        if self._drops_out and any(attributes["training"] for attributes in self._attributes):
            return "the base drops out in training mode"
        if self._config.output_attentions or self._config.output_hidden_states:
            return "the base's config asks for attention weights or hidden states"
        return None


def _has_dropout(base: PreTrainedModel) -> bool:
    """Whether any module, or the configuration, names a dropout that is not zero."""
    places = [vars(module) for module in base.modules()] + [base.config.to_dict()]
    named = (value for place in places for name, value in place.items() if "drop" in name)
    return any(isinstance(value, float) and value > 0.0 for value in named)


# ---- recognising a base ---------------------------------------------------------------------------------------------


def plan(base: PreTrainedModel) -> FusedDecoder | str:
    """The fused decoder of `base`, on which the prefix-aware attention function is installed; or why there is none.

    Raises:
        ValueError: the environment variable SOFTPROMPT_FAST_PACK_WEIGHTS is neither 0 nor 1.
    """
    if (unpacked := _why_not_packed(base)) is not None:
        return unpacked
    # What is kept for later calls must not be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        try:
            _check_structure(base)
            asked = _attention_options(base)
            decoder = FusedDecoder(base, asked)
            _prove(base, decoder)
        except (_UnservedError, ImportError) as error:
            return str(error)
        except Exception as error:
            # Whatever an unknown architecture raises here only means that it keeps its own pass.
            return f"a probe failed: {type(error).__name__}: {error}"
        return decoder


def _check_structure(base: PreTrainedModel) -> None:
    for p in base.parameters():
        if p.device.type != "cpu" or p.dtype != torch.float32 or type(p) not in (nn.Parameter, Tensor):
            found = f"{str(p.dtype).removeprefix('torch.')} on {p.device}"
            raise _UnservedError(f"it takes float32 weights on the CPU, found {found}")
    _expect_children("the model", base, {"model", "lm_head"})
    model: Any = base.model
    _expect_children("its decoder", model, {"embed_tokens", "layers", "norm", "rotary_emb"})
    if not isinstance(model.embed_tokens, nn.Embedding) or type(base.lm_head) is not nn.Linear:
        raise _UnservedError("its embeddings or its head are of another kind")
    if len(model.layers) != hooks.num_attention_layers(base) or not len(model.layers):
        raise _UnservedError("its layers are not those of its configuration")
    for i, layer in enumerate(model.layers):
        _expect_children("a layer", layer, _LAYER)
        _expect_children("its attention", layer.self_attn, _ATTENTION, _ATTENTION | _HEAD_NORMS)
        _expect_children("its mlp", layer.mlp, _MLP)
        linears = [getattr(layer.self_attn, name) for name in _ATTENTION]
        linears += [getattr(layer.mlp, name) for name in _MLP - {"act_fn"}]
        if other := [type(m) for m in linears if type(m) is not nn.Linear]:
            raise _UnservedError(f"a projection is no nn.Linear but a {other[0].__module__}.{other[0].__qualname__}")
        if getattr(layer.self_attn, "layer_idx", None) != i or not hasattr(layer.self_attn, "head_dim"):
            raise _UnservedError("its attention layers are not numbered in order, or name no head_dim")


def _expect_children(what: str, module: nn.Module, *allowed: set[str]) -> None:
    found = set(dict(module.named_children()))
    if found not in allowed or module._parameters:
        names = ", ".join(sorted(found | set(module._parameters)))
        raise _UnservedError(f"{what} is not llama-like: it holds {names}")


def _norm(module: Any, width: int | None = None) -> Any:
    """A norm module as the kernels take it, if it computes what they would."""
    from softprompt_fast.backends.cpu._linear import Norm

    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None or set(module._parameters) != {"weight"}:
        raise _UnservedError(f"{type(module).__name__} is no RMS norm of one weight")
    if width is not None and weight.shape[0] != width:
        raise _UnservedError(f"{type(module).__name__} normalises {weight.shape[0]} features, a head has {width}")
    # Of order one, and so small that eps tells.
    x = torch.linspace(-2.0, 3.0, weight.shape[0])
    x = torch.stack([x, float(eps) ** 0.5 * x])
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if torch.allclose(module(x), normed * (weight + offset), rtol=1e-5, atol=1e-5):
            return Norm("rms", weight.detach(), None, offset, float(eps))
    raise _UnservedError(f"{type(module).__name__} is no RMS norm")


def _activation(module: Any) -> str:
    x = torch.linspace(-6.0, 6.0, 64)
    for name, activation in _ACTIVATIONS.items():
        if torch.allclose(module(x), activation(x), rtol=1e-5, atol=1e-6):
            return name
    raise _UnservedError(f"activation {type(module).__name__} is not one of {', '.join(_ACTIVATIONS)}")


def _why_not_packed(base: PreTrainedModel) -> str | None:
    if (wanted := os.environ.get(PACK_VARIABLE)) is not None:
        if wanted not in ("0", "1"):
            raise ValueError(f"environment {PACK_VARIABLE}: expected 0 or 1, found {wanted!r}")
        return None if wanted == "1" else f"{PACK_VARIABLE}=0"
    linears = [module.weight.nbytes for module in base.modules() if type(module) is nn.Linear]
    if heuristics.pack_weights(sum(linears), _available_memory()):
        return None
    return "a packed copy of its weights would take more than a quarter of the available memory"


def _available_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less; 0: unknown."""
    available = 0
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        used = int((group / "memory.current").read_text(encoding="ascii")) - int(stat["file"])
        return min(available, max(0, limit - used))
    except (OSError, ValueError, KeyError, StopIteration):  # no Linux, no such control group, or one without a limit
        return available


# ---- the proof ------------------------------------------------------------------------------------------------------

_PREFIX, _OWN = 3, 4
_TOLERANCE = 1e-5
#: Deep models amplify rounding: another order of summation moved SmolLM2-135M's logits by 3e-6, one rounding of its
#: embeddings alone by up to 5e-6. So a base is allowed this many times what such a rounding does to it.
_NOISE = 8


def _probe_context(base: PreTrainedModel) -> hooks.PrefixContext:
    """Two rows behind a random prefix, the second one padded on the left."""
    attention = base.model.layers[0].self_attn
    head_dim = int(attention.head_dim)
    generator = torch.Generator().manual_seed(0)
    layers = range(hooks.num_attention_layers(base))
    shape = (attention.k_proj.out_features // head_dim, _PREFIX, head_dim)
    return hooks.PrefixContext(
        keys=tuple(torch.randn(shape, generator=generator) for _ in layers),
        values=tuple(torch.randn(shape, generator=generator) for _ in layers),
        own_start=torch.tensor([0, 2], dtype=torch.int32),
    )


def _probe_ids(base: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 1 + 2 * (_OWN + 1)).view(2, _OWN + 1)
    return ids % base.get_input_embeddings().num_embeddings


def _run_base(base: PreTrainedModel, context: hooks.PrefixContext, cache: Cache, **inputs: Tensor) -> Tensor:
    out = base(
        attention_mask=hooks.no_mask(2, torch.device("cpu")),
        past_key_values=cache,
        use_cache=True,
        **{hooks.KEYWORD: context},
        **inputs,
    )
    if type(out) is not CausalLMOutputWithPast:
        raise _UnservedError(f"its output is a {type(out).__name__}")
    return out.logits


def _attention_options(base: PreTrainedModel) -> dict[int, dict[str, Any]]:
    """What each layer asks of attention, as it asks when it runs."""
    context = _probe_context(base)
    context.options = {}
    ids = _probe_ids(base)
    _run_base(base, context, OwnTokenCache(hooks.num_attention_layers(base)), input_ids=ids)
    return context.options


def _prove(base: PreTrainedModel, decoder: FusedDecoder) -> None:
    """Compare a prefill, and a decode step far away: queries scaled by their position show only there."""
    context, ids, layers = _probe_context(base), _probe_ids(base), hooks.num_attention_layers(base)
    assert context.own_start is not None
    limit = hooks.position_limit(base)
    last = (limit.positions if limit is not None else 1 << 15) - 1
    own = (torch.arange(_OWN) - context.own_start[:, None]).clamp(min=0)
    positions, far = _PREFIX + own, torch.tensor([[last], [last - 1]])
    caches = [OwnTokenCache(layers), OwnTokenCache(layers)]

    expected = _run_base(base, context, caches[0], input_ids=ids[:, :_OWN], position_ids=positions)
    embeds = decoder.embed(ids)
    nearby = embeds[:, :_OWN] * (1 + torch.finfo(torch.float32).eps)
    nearby = _run_base(base, context, OwnTokenCache(layers), inputs_embeds=nearby, position_ids=positions)
    allowed = max(
        _TOLERANCE, _NOISE * max(_distance(nearby[0], expected[0]), _distance(nearby[1, 2:], expected[1, 2:]))
    )
    found = decoder(embeds[:, :_OWN], positions, context, caches[1])
    errors = [_distance(found[0], expected[0]), _distance(found[1, 2:], expected[1, 2:])]

    expected = _run_base(base, context, caches[0], inputs_embeds=embeds[:, _OWN:].clone(), position_ids=far)
    errors.append(_distance(decoder(embeds[:, _OWN:], far, context, caches[1], 1), expected))
    if not max(errors) <= allowed:
        raise _UnservedError(f"its logits differ from the fused pass by {max(errors):.1e} of the largest")


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


# ---- when it serves -------------------------------------------------------------------------------------------------


class LazyDecoder:
    """The fused decoder of one base, planned at the first call that could use it. Thread-safe."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._plan: FusedDecoder | str | None = None
        self._told: set[str] = set()

    def forget(self) -> None:
        """Plan anew: the base's weights, dtype, device or modules changed."""
        self._plan = None

    def get(self, backend: str | None) -> FusedDecoder | str:
        """What serves a plain inference call now, or the reason why the decoder is not fused."""
        if (name := requested(backend)) not in ("auto", "cpu"):
            return f"backend {name!r} is asked for"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        known = self._plan
        if known is None:
            with self._lock:
                known = self._plan
                if known is None:
                    # Reasons that pass are not kept.
                    if self._base.training and (hooks.drops_cache(self._base) or _has_dropout(self._base)):
                        return "the base is in training mode"
                    if (why := _BaseState(self._base).changed()) is not None:
                        return why
                    known = self._plan = plan(self._base)
        if isinstance(known, FusedDecoder) and (why := known.why_not_now()) is not None:
            return why
        return known

    def serving(
        self,
        embeds: Tensor | None,
        context: hooks.PrefixContext,
        cache: Cache | None,
        options: Mapping[str, Any] | None = None,
    ) -> FusedDecoder | None:
        """The fused decoder if it can serve this call; else None, and the reason is logged once.

        Args:
            embeds: the caller's embeddings, None for token ids.
            context: what the call attends to, and the backend it asks for.
            cache: as ``adopt`` leaves it.
            options: further keyword arguments for the base.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
            return None
        found = self.get(context.backend)
        why = found if isinstance(found, str) else _why_not_this_call(found, embeds, context, cache, options or {})
        if why is None and isinstance(found, FusedDecoder):
            return found
        if why is not None and why not in self._told:
            self._told.add(why)
            logger.info("%s: the decoder is not fused: %s", type(self._base).__name__, why)
        return None


def _why_not_this_call(
    decoder: FusedDecoder,
    embeds: Tensor | None,
    context: hooks.PrefixContext,
    cache: Cache | None,
    options: Mapping[str, Any],
) -> str | None:
    if asked := [name for name, value in options.items() if value is not None and value is not False]:
        return f"the call asks for {', '.join(asked)}"
    for layer in () if cache is None else cache.layers:
        if type(layer) not in (GrowingLayer, StaticLayer):
            return f"the cache has a {type(layer).__name__}"
    prefix = [*(context.keys or ()), *(context.values or ())]
    return decoder.why_not_these(embeds, prefix, context.scales is not None)
