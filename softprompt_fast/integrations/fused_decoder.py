# SPDX-License-Identifier: Apache-2.0
"""A llama-like decoder's inference pass in four C++ calls a layer, without transformers' modules in between.

Which bases it serves is no list of names. A base is recognised by its structure (``decoder_parts.py``) and then has
to prove it: base and fused pass run a few tokens, and where the logits differ (multipliers, other rotations, layers
without positions, ...) the base keeps its own pass. The differentiable passes (``fused_training.py``) are found,
proven and guarded in the same way.

What is read off the base once may not change later: hooks, replaced layers and changed weights are noticed before
every pass (:meth:`FusedDecoder.why_not_now`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import requested
from softprompt_fast.cache import GrowingLayer, OwnTokenCache, extend
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_parts import (
    BaseState,
    DecoderParts,
    LayerParts,
    UnservedError,
    check_structure,
    checked_rows,
    differentiated,
    has_dropout,
)
from softprompt_fast.integrations.fused_training import CHECKPOINTING_HOOK, FusedTraining

logger = logging.getLogger("softprompt_fast")

#: 1: pack weights however little memory is left; 0: never, and so fuse nothing.
PACK_VARIABLE = "SOFTPROMPT_FAST_PACK_WEIGHTS"


@dataclass(frozen=True)
class _Layer:
    """One layer's parts and its packed weights (``PackedLinear`` of ``backends/cpu/_linear.py``)."""

    parts: LayerParts
    qkv: Any
    output: Any
    gate_up: Any
    down: Any


class FusedDecoder:
    """The inference pass of one base, from embeddings to logits; :func:`plan` makes it.

    Args:
        base: the base, float32 on the CPU.
        parts: what it consists of.

    Raises:
        ImportError: the C++ extension is not there.
    """

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        from softprompt_fast.backends.cpu import _linear, prefix_attention, prompt_qkv

        self._linear, self._gated_mlp = _linear.linear, _linear.gated_mlp
        self._into_cache = prompt_qkv.into_cache
        self._attend: Callable[..., tuple[Tensor, Tensor]] = prefix_attention.forward
        self._state = BaseState(base)
        self._parts = parts
        self._packed_bytes = 0

        def packed(*linears: nn.Linear, heads: Sequence[int] | None = None) -> Any:
            weights = _linear.PackedLinear([m.weight for m in linears], [m.bias for m in linears], heads=heads)
            self._packed_bytes += weights.nbytes
            return weights

        heads = (parts.q_heads, parts.kv_heads, parts.kv_heads)
        self._layers = [
            _Layer(
                parts=layer,
                qkv=packed(layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj, heads=heads),
                output=packed(layer.attention.o_proj),
                gate_up=packed(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=packed(layer.mlp.down_proj),
            )
            for layer in parts.layers
        ]
        self._head = packed(parts.head)
        self._no_prefix = parts.embed.weight.new_empty(parts.kv_heads, 0, parts.head_dim)

    @property
    def embed(self) -> nn.Module:
        return self._parts.embed

    def why_not_now(self) -> str | None:
        """Why the base no longer computes what was planned; None where it does. Some tens of microseconds."""
        return self._state.changed()

    def why_not_these(self, embeds: Tensor | None, prefix: Sequence[Tensor], quantized: bool = False) -> str | None:
        """See :meth:`DecoderParts.why_not_these`; a differentiated call is not served either."""
        if differentiated(embeds, prefix, self._state.parameters):
            return "the call is differentiated"
        return self._parts.why_not_these(embeds, prefix, quantized)

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
        parts = self._parts
        cos, sin = parts.rotary(hidden, positions)
        cos, sin = cos.contiguous(), sin.contiguous()
        x = hidden.reshape(batch * length, width).clone()  # the residual stream, which every layer adds to in place
        shape = (batch, parts.kv_heads, length, parts.head_dim)
        scratch = GrowingLayer(length)
        rows: tuple[Tensor | None, ...] | None = None
        for i, layer in enumerate(self._layers):
            own = scratch if cache is None else cache.layers[i]
            new_keys, new_values, keys, values = extend(own, x, shape, parts.head_dim)
            prefix_keys = self._no_prefix if context.keys is None else context.keys[i]
            prefix_values = self._no_prefix if context.values is None else context.values[i]
            if rows is None:
                rows = checked_rows(context, batch, keys.shape[2], prefix_keys.shape[1])
            query = self._into_cache(
                x.view(batch, length, width),
                layer.parts.norm,
                layer.qkv,
                parts.q_heads,
                parts.kv_heads,
                cos,
                sin,
                new_keys,
                new_values,
                q_norm=layer.parts.q_norm,
                k_norm=layer.parts.k_norm,
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
                layer.parts.scale,
                True,
                layer.parts.sliding_window,
                layer.parts.softcap,
                None,
                None,
                *(() if context.scales is None else context.scales.of_layer(i)),
            )
            x = self._linear(attended.transpose(1, 2).reshape(x.shape[0], -1), layer.output, residual=x)
            x = self._gated_mlp(x, layer.parts.mlp_norm, layer.gate_up, layer.down, parts.activation, x)
            if cache is None:
                scratch.crop(-length)
        if isinstance(logits_to_keep, Tensor):
            x = x.view(batch, length, width)[:, logits_to_keep].reshape(-1, width)
        logits = self._linear(x, self._head, norm=parts.norm)
        return logits.view(batch, -1, self._head.out_features)


# ---- recognising a base ---------------------------------------------------------------------------------------------


def plan(base: PreTrainedModel) -> FusedDecoder | str:
    """The fused decoder of `base`, on which the prefix-aware attention function is installed; or why there is none.

    Raises:
        ValueError: the environment variable SOFTPROMPT_FAST_PACK_WEIGHTS is neither 0 nor 1.
    """
    if (unpacked := _why_not_fused() or _why_not_packed(base)) is not None:
        return unpacked
    return proven(base, FusedDecoder, _prove)


_Fused = TypeVar("_Fused")


def plan_training(base: PreTrainedModel) -> FusedTraining | str:
    """The differentiable passes of `base` as :func:`plan` gives its inference pass; no weight is packed."""
    if (why := _why_not_fused()) is not None:
        return why
    return proven(base, FusedTraining, _prove_training)


def proven(
    base: PreTrainedModel,
    make: Callable[[PreTrainedModel, DecoderParts], _Fused],
    prove: Callable[[PreTrainedModel, _Fused], None],
) -> _Fused | str:
    """What `make` makes of a base of the right structure, if it computes the same as the base; else why not."""
    # What is kept for later calls must not be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        try:
            check_structure(base)
            fused = make(base, DecoderParts(base, _attention_options(base)))
            prove(base, fused)
        except (UnservedError, ImportError) as error:
            return str(error)
        except Exception as error:
            # Whatever an unknown architecture raises here only means that it keeps its own pass.
            return f"a probe failed: {type(error).__name__}: {error}"
        return fused


def _why_not_fused() -> str | None:
    if (wanted := os.environ.get(PACK_VARIABLE)) not in (None, "0", "1"):
        raise ValueError(f"environment {PACK_VARIABLE}: expected 0 or 1, found {wanted!r}")
    return f"{PACK_VARIABLE}=0" if wanted == "0" else None


def _why_not_packed(base: PreTrainedModel) -> str | None:
    if os.environ.get(PACK_VARIABLE) == "1":
        return None
    linears = [module.weight.nbytes for module in base.modules() if type(module) is nn.Linear]
    if heuristics.pack_weights(sum(linears), available_memory()):
        return None
    return "a packed copy of its weights would take more than a quarter of the available memory"


def available_memory() -> int:
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
        raise UnservedError(f"its output is a {type(out).__name__}")
    return out.logits


def _attention_options(base: PreTrainedModel) -> dict[int, dict[str, Any]]:
    """What each layer asks of attention, as it asks when it runs."""
    context = _probe_context(base)
    context.options = {}
    ids = _probe_ids(base)
    _run_base(base, context, OwnTokenCache(hooks.num_attention_layers(base)), input_ids=ids)
    return context.options


@dataclass(frozen=True)
class _Probe:
    """A prefill, and a decode step far away: queries scaled by their position show only there."""

    context: hooks.PrefixContext
    ids: Tensor
    positions: Tensor  # of the prefill, [2, _OWN]
    far: Tensor  # of the step, [2, 1]

    @classmethod
    def of(cls, base: PreTrainedModel) -> _Probe:
        context, limit = _probe_context(base), hooks.position_limit(base)
        assert context.own_start is not None
        last = (limit.positions if limit is not None else 1 << 15) - 1
        own = (torch.arange(_OWN) - context.own_start[:, None]).clamp(min=0)
        return cls(context, _probe_ids(base), _PREFIX + own, torch.tensor([[last], [last - 1]]))

    def expected(self, base: PreTrainedModel) -> tuple[Tensor, Tensor, float]:
        """The base's logits of both, and how far others may be from them."""
        layers, embeds = hooks.num_attention_layers(base), base.get_input_embeddings()(self.ids)
        cache = OwnTokenCache(layers)
        first = {"input_ids": self.ids[:, :_OWN], "position_ids": self.positions}
        expected = _run_base(base, self.context, cache, **first)
        nearby = embeds[:, :_OWN] * (1 + torch.finfo(torch.float32).eps)
        nearby = _run_base(
            base, self.context, OwnTokenCache(layers), inputs_embeds=nearby, position_ids=self.positions
        )
        step = _run_base(base, self.context, cache, input_ids=self.ids[:, _OWN:], position_ids=self.far)
        return expected, step, max(_TOLERANCE, _NOISE * max(self.errors(nearby, expected)))

    @staticmethod
    def errors(found: Tensor, expected: Tensor) -> list[float]:
        """Of the first row, and of the second behind its padding."""
        return [_distance(found[0], expected[0]), _distance(found[1, 2:], expected[1, 2:])]


def _check_errors(errors: Sequence[float], allowed: float) -> None:
    if not max(errors) <= allowed:
        raise UnservedError(f"its logits differ from the fused pass by {max(errors):.1e} of the largest")


def _prove(base: PreTrainedModel, decoder: FusedDecoder) -> None:
    probe = _Probe.of(base)
    expected, step, allowed = probe.expected(base)
    cache = OwnTokenCache(hooks.num_attention_layers(base))
    embeds = decoder.embed(probe.ids)
    found = decoder(embeds[:, :_OWN], probe.positions, probe.context, cache)
    found_step = decoder(embeds[:, _OWN:], probe.far, probe.context, cache, 1)
    _check_errors([*probe.errors(found, expected), _distance(found_step, step)], allowed)


def _prove_training(base: PreTrainedModel, passes: FusedTraining) -> None:
    """All own tokens at once: what is not kept in a cache computes the same."""
    probe = _Probe.of(base)
    expected, step, allowed = probe.expected(base)
    positions = torch.cat([probe.positions, probe.far], dim=1)
    real = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9])  # of two rows of five, the second one without its padding
    hidden = passes.own(passes.embed(probe.ids), positions, probe.context, real)
    logits = passes.head.logits(hidden)
    errors = [_distance(logits[:4], expected[0]), _distance(logits[5:7], expected[1, 2:])]
    _check_errors([*errors, _distance(logits[[4, 7]], step[:, 0])], allowed)


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


# ---- when it serves -------------------------------------------------------------------------------------------------


class LazyDecoder:
    """The fused decoder and the fused training passes of one base, each planned at the first call that could use it.
    Thread-safe."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._plan: FusedDecoder | str | None = None
        self._training_plan: FusedTraining | str | None = None
        self._told: set[str] = set()

    def forget(self) -> None:
        """Plan anew: the base's weights, dtype, device or modules changed."""
        self._plan = self._training_plan = None

    def get(self, backend: str | None) -> FusedDecoder | str:
        """What serves a plain inference call now, or the reason why the decoder is not fused."""
        if (why := self._why_not_asked(backend)) is not None:
            return why
        known = self._plan
        if known is None:
            with self._lock:
                known = self._plan
                if known is None:
                    # Reasons that pass are not kept.
                    if self._base.training and (hooks.drops_cache(self._base) or has_dropout(self._base)):
                        return "the base is in training mode"
                    if (why := BaseState(self._base).changed()) is not None:
                        return why
                    known = self._plan = plan(self._base)
        if isinstance(known, FusedDecoder) and (why := known.why_not_now()) is not None:
            return why
        return known

    def get_training(self, backend: str | None) -> FusedTraining | str:
        """What serves a plain training call now, or the reason why its passes are not fused."""
        if (why := self._why_not_asked(backend)) is not None:
            return why
        known = self._training_plan
        if known is None:
            with self._lock:
                known = self._training_plan
                if known is None:
                    if (why := BaseState(self._base).changed(harmless=CHECKPOINTING_HOOK)) is not None:
                        return why
                    with without_checkpointing(self._base):
                        known = self._training_plan = plan_training(self._base)
        if isinstance(known, FusedTraining) and (why := known.why_not_now()) is not None:
            return why
        return known

    @staticmethod
    def _why_not_asked(backend: str | None) -> str | None:
        if (name := requested(backend)) not in ("auto", "cpu"):
            return f"backend {name!r} is asked for"
        return "autocast is on" if torch.is_autocast_enabled("cpu") else None

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
        if _is_traced():
            return None
        prefix = [*(context.keys or ()), *(context.values or ())]
        # Asked before anything is planned: a plan packs a second copy of the weights.
        differentiates = differentiated(embeds, prefix, self._base.parameters() if self._plan is None else ())
        found = "the call is differentiated" if differentiates else self.get(context.backend)
        why = found if isinstance(found, str) else _why_not_this_call(found, embeds, context, cache, options or {})
        if why is None and isinstance(found, FusedDecoder):
            return found
        self._tell("the decoder is not fused", why)
        return None

    def training(
        self, embeds: Tensor | None, context: hooks.PrefixContext, options: Mapping[str, Any] | None = None
    ) -> FusedTraining | None:
        """The differentiable passes if they can serve this call, of which a gradient is wanted; else None, and the
        reason is logged once.

        Args:
            embeds: the caller's embeddings (a prompt's, or own tokens'), None for token ids.
            context: what the call attends to, and the backend it asks for.
            options: further keyword arguments for the base.
        """
        prefix = [*(context.keys or ()), *(context.values or ())]
        if _is_traced() or not differentiated(embeds, prefix):
            return None
        found, why = self.get_training(context.backend), None
        if asked := _asked_for(options or {}):
            why = f"the call asks for {asked}"
        elif context.scales is not None:
            why = "a prefix is kept in 8 bits"
        elif isinstance(found, str):
            why = found
        elif (why := found.why_not_these(embeds, prefix)) is None:
            return found
        self._tell("training is not fused", why)
        return None

    def _tell(self, what: str, why: str | None) -> None:
        if why is not None and why not in self._told:
            self._told.add(why)
            logger.info("%s: %s: %s", type(self._base).__name__, what, why)


@contextmanager
def without_checkpointing(base: PreTrainedModel) -> Iterator[None]:
    """Checkpointed layers of a base in training mode drop the cache that a probe needs."""
    modules = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _is_traced() -> bool:
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())


def _asked_for(options: Mapping[str, Any]) -> str:
    return ", ".join(name for name, value in options.items() if value is not None and value is not False)


def _why_not_this_call(
    decoder: FusedDecoder,
    embeds: Tensor | None,
    context: hooks.PrefixContext,
    cache: Cache | None,
    options: Mapping[str, Any],
) -> str | None:
    if asked := _asked_for(options):
        return f"the call asks for {asked}"
    for layer in () if cache is None else cache.layers:
        if type(layer) not in (GrowingLayer, StaticLayer):
            return f"the cache has a {type(layer).__name__}"
    prefix = [*(context.keys or ()), *(context.values or ())]
    return decoder.why_not_these(embeds, prefix, context.scales is not None)
