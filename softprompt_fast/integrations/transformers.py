# SPDX-License-Identifier: Apache-2.0
"""How the prefix reaches the layers of a transformers model.

transformers >= 5 hands unknown keyword arguments of ``model(...)`` down to the attention function. A
:class:`PrefixContext` travels that way (keyword ``soft_prompt``) and :func:`soft_prompt_attention` picks its layer by
``module.layer_idx``: no global state, so threads, recomputation and torch.compile are safe, and nothing rides on
``past_key_values``, which transformers drops under gradient checkpointing.

A model is switched once to an attention implementation named ``softprompt_fast_<original>``. Without a context it
calls the original implementation with the original mask, so the base model keeps computing what it computed before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from softprompt_fast.ops import prefix_attention
from softprompt_fast.prefix_kv import Scales

KEYWORD = "soft_prompt"
_NAME = "softprompt_fast_"

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class PrefixContext:
    """What one forward pass attends to besides its own tokens.

    Attributes:
        keys, values: per layer ``[Hkv, L, D]``: the prefixes of this batch, packed end to end; None: no row has one.
        prefix_offsets: int32 ``[N + 1]``, where each packed prefix starts; None: one prefix of length L.
        prefix_index: int32 ``[B]``, the prefix of a row, -1 for none; None: every row uses prefix 0.
        own_start, own_end: int32 ``[B]``, each row's range of real own tokens (None: no padding on that side).
        query_start: int32 ``[B]``, own position of a row's first query (None: T - S, see ``prefix_attention``).
        causal: False in encoders.
        backend: backend to force, None for "auto".
        options: what each layer that asked for its prefix wants of attention besides (``scaling``, ``sliding_window``,
            ``softcap``, ``s_aux``), filled only while a model is probed.
        scales: of 8-bit keys and values; None: they are floating.
        max_prefix_length: of the longest prefix, which lets kernels share out their work; None: not known.
    """

    keys: tuple[torch.Tensor, ...] | None
    values: tuple[torch.Tensor, ...] | None
    prefix_offsets: torch.Tensor | None = None
    prefix_index: torch.Tensor | None = None
    own_start: torch.Tensor | None = None
    own_end: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    causal: bool = True
    backend: str | None = None
    options: dict[int, dict[str, Any]] | None = None
    scales: Scales | None = None
    max_prefix_length: int | None = None


class CaptureContext:
    """Records each layer's own keys and values ``[B, Hkv, S, D]`` as attention sees them (after RoPE).

    This is how a prompt is compiled: no cache is involved, so nothing is copied, dropped by a sliding window, or lost
    under gradient checkpointing, and the recorded tensors carry their autograd graph.

    Attributes:
        stop_after: raise :class:`CapturedAll` once this many layers are recorded: what the last of them computes
            behind its keys and values is then not computed. None: the pass runs to its end.
    """

    # No dataclass: FSDP hands its layers copies of dataclass arguments, and a copy would keep what it records.
    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.stop_after: int | None = None


class CapturedAll(Exception):
    """All layers that a :class:`CaptureContext` waits for are recorded."""


class _BehindAllLayers(torch.autograd.Function):
    """Identity over captured keys and values and what the last layer leads to."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def behind_all_layers(base: PreTrainedModel, context: CaptureContext, logits: torch.Tensor) -> torch.Tensor:
    """`logits` (and the captured keys and values), such that a backward pass enters every layer at its end.

    FSDP gathers a layer's weights when a gradient reaches the layer's output. That of the last layer's keys and values
    does not come that way where nobody asks for logits; a gradient of zeros from `logits` does.
    """
    if not any(isinstance(module, FSDPModule) for module in base.modules()):
        return logits
    layers = list(context.keys)
    pairs = [*(context.keys[i] for i in layers), *(context.values[i] for i in layers)]
    logits, *pairs = _BehindAllLayers.apply(logits, *pairs)
    context.keys = dict(zip(layers, pairs, strict=False))
    context.values = dict(zip(layers, pairs[len(layers) :], strict=True))
    return logits


def soft_prompt_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the shared prefix and the row's own tokens; ``original`` where there is no context.

    Args:
        module: the attention layer; ``module.layer_idx`` picks the layer's prefix.
        query: ``[B, Hq, S, D]``. key, value: ``[B, Hkv, T, D]``, own tokens only.
        attention_mask: the original implementation's mask; unused with a :class:`PrefixContext`.

    Returns:
        ``[B, S, Hq, Dv]`` and the attention weights where the original gives them, else None.
    """
    context = kwargs.pop(KEYWORD, None)
    if isinstance(context, PrefixContext):
        return _shared_prefix(module, query, key, value, context, original, **kwargs)
    if isinstance(context, CaptureContext) and module.layer_idx not in context.keys:
        # "not in": a checkpointed layer runs twice, and only the first run's tensors are in the graph.
        context.keys[module.layer_idx] = key
        context.values[module.layer_idx] = value
        if len(context.keys) == context.stop_after:
            raise CapturedAll
    return original(module, query, key, value, attention_mask, **kwargs)


def _shared_prefix(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: PrefixContext,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if context.options is not None:
        asked = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        context.options[module.layer_idx] = asked
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    prefix_key, prefix_value = _layer_prefix(module, key, value, context)
    if context.scales is None:
        prefix_key, prefix_value = _autocast(prefix_key), _autocast(prefix_value)
    if dropout > 0.0 or position_bias is not None or kwargs.get("output_attentions"):
        # The op has no dropout and returns no weights: expand the prefix and let the original do it.
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux, **kwargs}
        options = {name: option for name, option in options.items() if option is not None}
        return _expanded_attention(module, query, key, value, context, original, sliding_window, options)
    scales: dict[str, Any] = {}
    if context.scales is not None:
        scales["prefix_key_scale"] = context.scales.keys[module.layer_idx]
        scales["prefix_value_scale"] = context.scales.values[module.layer_idx]
        scales["prefix_scale_block"] = context.scales.block
    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_offsets=context.prefix_offsets,
        prefix_index=context.prefix_index,
        own_start=context.own_start,
        own_end=context.own_end,
        query_start=context.query_start,
        scale=scaling,
        causal=context.causal,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        max_prefix_length=context.max_prefix_length,
        backend=context.backend,
        **scales,
    )
    return out.transpose(1, 2), None


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast does to the arguments of PyTorch's own attention: rotated keys are float32, values not."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _layer_prefix(
    module: Any, key: torch.Tensor, value: torch.Tensor, context: PrefixContext
) -> tuple[torch.Tensor, torch.Tensor]:
    if context.keys is None or context.values is None:
        return key.new_empty(key.shape[1], 0, key.shape[3]), value.new_empty(value.shape[1], 0, value.shape[3])
    return context.keys[module.layer_idx], context.values[module.layer_idx]


def _expanded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: PrefixContext,
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    sliding_window: int | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same attention with every row holding its own copy of all packed prefixes, and a dense mask."""
    batch, _, length, _ = query.shape
    prefix_key, prefix_value = _layer_prefix(module, key, value, context)
    if context.scales is not None:
        prefix_key, prefix_value = context.scales.dequantize(module.layer_idx, prefix_key, prefix_value, key.dtype)
    visible = dense_visibility(context, batch, length, key.shape[2], prefix_key.shape[1], sliding_window, query.device)
    keys = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
    floor = torch.finfo(query.dtype).min
    mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, floor)[:, None]
    return original(module, query, keys, values, mask, **options)


def dense_visibility(
    context: PrefixContext,
    batch: int,
    num_queries: int,
    num_own_keys: int,
    prefix_length: int,
    sliding_window: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Which of the ``prefix_length`` packed prefix entries and own keys each query sees: bool ``[B, S, L + T]``."""
    offsets = context.prefix_offsets
    if offsets is None:
        offsets = torch.tensor([0, prefix_length], device=device)
    index = context.prefix_index
    if index is None:
        index = torch.zeros(batch, dtype=torch.long, device=device)
    index = index.long()
    safe = index.clamp(min=0)
    first = torch.where(index < 0, 0, offsets[safe])
    last = torch.where(index < 0, 0, offsets[safe + 1])

    def rows(values: torch.Tensor | None, default: int) -> torch.Tensor:
        return torch.full((batch,), default, device=device) if values is None else values.to(device)

    start, end = rows(context.own_start, 0), rows(context.own_end, num_own_keys)
    query = rows(context.query_start, num_own_keys - num_queries)[:, None] + torch.arange(num_queries, device=device)
    entry = torch.arange(prefix_length, device=device)
    own = torch.arange(num_own_keys, device=device)
    sees_prefix = (entry >= first[:, None]) & (entry < last[:, None])
    sees_own = (own >= start[:, None]) & (own < end[:, None])
    sees_prefix = sees_prefix[:, None].expand(-1, num_queries, -1)
    sees_own = sees_own[:, None].expand(-1, num_queries, -1)
    if context.causal:
        sees_own = sees_own & (own <= query[..., None])
    if sliding_window is not None:
        length = (last - first)[:, None]
        query_position = (length + query - start[:, None])[..., None]
        sees_prefix = sees_prefix & (query_position - (entry - first[:, None])[:, None] < sliding_window)
        sees_own = sees_own & (query_position - (length + own - start[:, None])[:, None] < sliding_window)
    return torch.cat([sees_prefix, sees_own], dim=-1)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The `eager_attention_forward` that the module's own file defines: "eager" is no registered function."""
    forward = inspect.unwrap(type(module).forward)
    return forward.__globals__["eager_attention_forward"]


def register(prefix: str, original_name: str, attend: Callable[..., Any]) -> str:
    """Register `attend`, and the mask function of `original_name`, under ``prefix + original_name``; returns that.

    `attend` is called as ``attend(module, query, key, value, attention_mask, original, **options)`` with the original
    attention function.
    """
    name = prefix + original_name
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            original = _eager(module) if original_name == "eager" else ALL_ATTENTION_FUNCTIONS[original_name]
            return attend(module, query, key, value, attention_mask, original, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        if original_name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original_name])
    return name


def original_attention(base: PreTrainedModel) -> str:
    """The attention implementation that `base` had before :func:`install`."""
    return str(base.config._attn_implementation).removeprefix(_NAME)


def install(base: PreTrainedModel) -> str | None:
    """Switch `base` to the prefix-aware attention function. Returns the reason why it can't be, or None.

    Without a context the model computes what it computed before, bit for bit.
    """
    current = base.config._attn_implementation
    if current is None:
        return "its config names no attention implementation"
    if current.startswith(_NAME):
        return None
    if not base._can_set_attn_implementation():
        return f"{type(base).__name__} bypasses transformers' attention interface"
    name = register(_NAME, current, soft_prompt_attention)
    base.set_attn_implementation(name)
    if base.config._attn_implementation != name:
        return f"{type(base).__name__} refused the attention implementation {name!r}"
    return None


def uninstall(base: PreTrainedModel) -> None:
    """Give `base` its own attention implementation back."""
    if base.config._attn_implementation != original_attention(base):
        base.set_attn_implementation(original_attention(base))


def no_mask(batch: int, device: torch.device) -> torch.Tensor:
    """The mask passed with a context: 4-D, so that transformers builds none, and empty, so that any attention
    function which is not ours fails on its shape instead of silently attending without the prefix."""
    return torch.empty(batch, 1, 0, 0, dtype=torch.bool, device=device)


def forward_arguments(base: PreTrainedModel) -> frozenset[str]:
    """The keyword arguments that ``base.forward`` or something below it understands."""
    return frozenset(inspect.signature(base.forward).parameters) | TransformersKwargs.__annotations__.keys()


def take_causal(options: dict[str, Any]) -> None:
    """Take ``is_causal`` out of a call's `options`: the base must not be given it, for transformers writes it into the
    config, where the calls of other threads find it.

    Raises:
        ValueError: it asks for attention that is not causal, behind which no prefix can be computed once.
    """
    if options.pop("is_causal", None) not in (None, True):
        raise ValueError("is_causal: expected True or None; a prompt is computed once, which needs causal attention")


def num_attention_layers(base: PreTrainedModel) -> int:
    return int(base.config.get_text_config(decoder=True).num_hidden_layers)


def drops_cache(base: PreTrainedModel) -> bool:
    """Whether a forward pass now would ignore `past_key_values`, as checkpointed layers do in training mode."""
    return base.training and is_checkpointing(base)


def enable_checkpointing(base: PreTrainedModel, kwargs: dict[str, Any] | None, **options: Any) -> None:
    """Switch activation checkpointing of `base` on, non-reentrant unless `kwargs` (of ``torch.utils.checkpoint``) say
    otherwise: the reentrant kind would cut the prompt's gradient. `options` as the installed transformers has them."""
    kwargs = {"use_reentrant": False, **(kwargs or {})}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def disable_checkpointing(base: PreTrainedModel) -> None:
    """Switch activation checkpointing of `base` off."""
    name = "activation_checkpointing_disable"
    getattr(base, name if hasattr(base, name) else "gradient_checkpointing_disable")()


def is_checkpointing(base: PreTrainedModel) -> bool:
    """Whether a layer of `base` is checkpointed while it trains."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def shallow_copy(module: _Module, **attributes: Any) -> _Module:
    """A module of the same class with the same attributes, but for `attributes`."""
    copy: _Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__, **attributes)
    return copy


@contextmanager
def evaluating(module: _Module) -> Iterator[_Module]:
    """`module` without dropout and checkpoints, while other threads train it: a view of it, over the same parameters,
    whose modules are copies in evaluation mode. What a pass writes to its modules stays in the view.

    A forward of a module's own (as accelerate's offloading installs) and a compiled one are bound to that very object:
    where there is one, `module` itself is in evaluation mode meanwhile, for all threads.
    """
    training = [m for m in module.modules() if m.training]
    if not training:
        yield module
    elif any(m._compiled_call_impl or "forward" in m.__dict__ for m in module.modules()):
        for m in training:
            m.training = False
        try:
            yield module
        finally:
            for m in training:
                m.training = True
    else:
        yield _evaluation_view(module)


def _evaluation_view(module: _Module) -> _Module:
    copies: dict[nn.Module, nn.Module] = {}
    for m in module.modules():
        # Parameters stay in their table: FSDP gathers them there.
        tables = {name: x.copy() for name, x in m.__dict__.items() if isinstance(x, dict) and name != "_parameters"}
        copies[m] = shallow_copy(m, **tables, training=False)
    for copy in copies.values():
        copy._modules.update((name, copies[m]) for name, m in copy._modules.items() if m is not None)
    return copies[module]  # type: ignore[return-value]


def may_stop_early(base: PreTrainedModel) -> bool:
    """Whether a pass of `base` may be left by an exception: nobody waits for the end of one of its modules. Hooks may
    (FSDP's do), a checkpointed layer would meet the exception again in the backward pass, dynamo can't trace it."""
    if torch.compiler.is_compiling() or drops_cache(base):
        return False
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl
        or "forward" in m.__dict__
        for m in base.modules()
    )


def run_prompt(
    base: PreTrainedModel, embeds: torch.Tensor, logits_to_keep: int, *, next_logits: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
    """Keys and values per layer ``[N, Hkv, P, D]`` and logits of ``[N, P, H]`` prompt embeddings. Where not even
    `next_logits` are wanted, the pass ends at the last layer's keys and values, with no logits, if the base lets it.

    Raises:
        ValueError: checkpointed layers cut the gradient.
    """
    capture, layers = CaptureContext(), range(num_attention_layers(base))
    if logits_to_keep == 1 and not next_logits and may_stop_early(base):
        capture.stop_after = len(layers)
    logits: torch.Tensor | None = None
    with suppress(CapturedAll):
        wanted = {"logits_to_keep": logits_to_keep, KEYWORD: capture}
        logits = base(inputs_embeds=embeds, use_cache=False, **wanted).logits
    if torch.is_grad_enabled() and embeds.requires_grad and not capture.keys[0].requires_grad:
        raise ValueError(
            "gradient checkpointing with use_reentrant=True would cut the prompt's gradient: enable it on the "
            "base with use_reentrant=False"
        )
    if logits is not None:
        logits = behind_all_layers(base, capture, logits)
    return [capture.keys[i] for i in layers], [capture.values[i] for i in layers], logits


@dataclass(frozen=True)
class PositionLimit:
    """How many positions a prompt and a row's own tokens may take together, and why no more."""

    positions: int
    why: str

    def check(self, needed: int, virtual: int) -> None:
        """ValueError where `needed` positions, `virtual` of them of a prompt, are too many."""
        if needed > self.positions:
            raise ValueError(
                f"input_ids: {virtual} virtual and {needed - virtual} own tokens need {needed} positions, but "
                f"{self.why}"
            )


def position_limit(base: PreTrainedModel) -> PositionLimit | None:
    """The limit of a base model; None where its position code has none (ALiBi, ...)."""
    config = base.config.get_text_config(decoder=True)
    limits = []
    if positions := getattr(config, "max_position_embeddings", None):
        limits.append(PositionLimit(int(positions), f"the base model has max_position_embeddings={positions}"))
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one a layer type.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        original = parameters.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None) or positions
        if parameters.get("rope_type") in ("longrope", "dynamic") and original:
            # Past it, every token's rotation depends on the length of the whole sequence, also those computed before.
            why = f"rope_type={parameters['rope_type']!r} rotates all earlier tokens anew beyond {original}"
            limits.append(PositionLimit(int(original), why))
    return min(limits, key=lambda limit: limit.positions, default=None)
