# SPDX-License-Identifier: Apache-2.0
"""Which bases and calls a llama-like decoder's fused passes serve (``decoder_pass.py``; with gradients
``fused_training.py``), and why not others.

Which bases is no list of names. A base is recognised by its structure (``decoder_parts.py``) and then has to prove
it: base and fused pass run a few tokens, and where the logits differ (multipliers, other rotations, layers without
positions, ...) the base keeps its own pass.

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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import requested
from softprompt_fast.cache import GrowingLayer, OwnTokenCache
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_parts import (
    BaseState,
    DecoderParts,
    UnservedError,
    check_structure,
    differentiated,
    has_dropout,
)
from softprompt_fast.integrations.decoder_pass import CppDecoder, CudaDecoder, FusedDecoder
from softprompt_fast.integrations.fused_training import CHECKPOINTING_HOOK, FusedTraining

logger = logging.getLogger("softprompt_fast")

#: 1: pack weights however little memory is left; 0: never, and so fuse nothing.
PACK_VARIABLE = "SOFTPROMPT_FAST_PACK_WEIGHTS"


# ---- recognising a base ---------------------------------------------------------------------------------------------


def plan(base: PreTrainedModel, backend: str = "cpu") -> FusedDecoder | str:
    """The fused decoder of `base`, on which the prefix-aware attention function is installed; or why there is none.

    Args:
        backend: whose kernels it uses, "cpu" or "cuda".

    Raises:
        ValueError: the environment variable SOFTPROMPT_FAST_PACK_WEIGHTS is neither 0 nor 1.
    """
    if backend == "cuda":
        why = _why_not_of(base, "bfloat16 or float16 weights on one device", torch.bfloat16, torch.float16)
    else:
        why = _why_not_fused() or _why_not_packed(base) or _why_not_in_floats(base)
    if why is not None:
        return why
    kind: type[FusedDecoder] = CudaDecoder if backend == "cuda" else CppDecoder
    return proven(base, kind, _prove)


def _why_not_in_floats(base: PreTrainedModel) -> str | None:
    return _why_not_of(base, "float32 weights on the CPU", torch.float32, device="cpu")


def _why_not_of(base: PreTrainedModel, what: str, *dtypes: torch.dtype, device: str | None = None) -> str | None:
    """The reason, if weights of `base` are not all plain ones of one of these dtypes, where the first one is."""
    first = next(base.parameters())
    for p in base.parameters():
        alike = p.device == first.device and p.dtype == first.dtype and p.device.type == (device or p.device.type)
        if not alike or p.dtype not in dtypes or type(p) not in (nn.Parameter, Tensor):
            return f"it takes {what}, found {str(p.dtype).removeprefix('torch.')} on {p.device}"
    return None


_Fused = TypeVar("_Fused")


def plan_training(base: PreTrainedModel) -> FusedTraining | str:
    """The differentiable passes of `base` as :func:`plan` gives its inference pass; no weight is packed."""
    if (why := _why_not_fused() or _why_not_in_floats(base)) is not None:
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
            with hooks.evaluating(base) as view:
                fused = make(base, DecoderParts(base, _attention_options(view)))
                prove(view, fused)
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
#: embeddings alone by up to 5e-6. So a base is allowed this many times what such a rounding does to it. In 16 bits,
#: where it leads to other roundings everywhere, twice: tiny models differed by 0.7 to 1.2 times that, queries scaled
#: by position, the faintest of what a base may do besides, by 3.
_NOISE, _NOISE_IN_16_BITS = 8, 2


def _probe_context(base: PreTrainedModel) -> hooks.PrefixContext:
    """Two rows behind a random prefix, the second one padded on the left."""
    attention, weight = base.model.layers[0].self_attn, base.get_input_embeddings().weight
    head_dim = int(attention.head_dim)
    generator = torch.Generator(device="cpu").manual_seed(0)
    layers = range(hooks.num_attention_layers(base))
    shape = (attention.k_proj.out_features // head_dim, _PREFIX, head_dim)
    return hooks.PrefixContext(
        keys=tuple(torch.randn(shape, generator=generator, device="cpu").to(weight) for _ in layers),
        values=tuple(torch.randn(shape, generator=generator, device="cpu").to(weight) for _ in layers),
        own_start=torch.tensor([0, 2], dtype=torch.int32, device=weight.device),
    )


def _probe_ids(base: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 1 + 2 * (_OWN + 1), device=base.device).view(2, _OWN + 1)
    return ids % base.get_input_embeddings().num_embeddings


def _run_base(base: PreTrainedModel, context: hooks.PrefixContext, cache: Cache, **inputs: Tensor) -> Tensor:
    out = base(
        attention_mask=hooks.no_mask(2, base.device),
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
        own = (torch.arange(_OWN, device=base.device) - context.own_start[:, None]).clamp(min=0)
        far = torch.tensor([[last], [last - 1]], device=base.device)
        return cls(context, _probe_ids(base), _PREFIX + own, far)

    def check(self, base: PreTrainedModel, found: Sequence[Tensor]) -> None:
        """Whether `found`, in parts as of :meth:`parts`, are the base's logits.

        Raises:
            UnservedError: they are not.
        """
        embeds = base.get_input_embeddings()(self.ids)
        eps = torch.finfo(embeds.dtype).eps
        expected = self._run(base, embeds)
        noise = max(map(_distance, self._run(base, embeds * (1 + eps)), expected))
        exact = embeds.dtype == torch.float32
        allowed = max(_TOLERANCE, _NOISE * noise) if exact else _NOISE_IN_16_BITS * noise
        error = max(map(_distance, found, expected))
        if not error <= allowed:
            raise UnservedError(f"its logits differ from the fused pass by {error:.1e} of the largest")

    def _run(self, base: PreTrainedModel, embeds: Tensor) -> list[Tensor]:
        cache = OwnTokenCache(hooks.num_attention_layers(base))
        first, step = embeds[:, :_OWN], embeds[:, _OWN:]
        return self.parts(
            _run_base(base, self.context, cache, inputs_embeds=first, position_ids=self.positions),
            _run_base(base, self.context, cache, inputs_embeds=step, position_ids=self.far),
        )

    @staticmethod
    def parts(prefill: Tensor, step: Tensor) -> list[Tensor]:
        """Logits of the first row, of the second behind its padding, and of the step."""
        return [prefill[0], prefill[1, 2:], step]


def _prove(base: PreTrainedModel, decoder: FusedDecoder) -> None:
    probe = _Probe.of(base)
    cache = OwnTokenCache(hooks.num_attention_layers(base))
    prefill = decoder(probe.ids[:, :_OWN], probe.positions, probe.context, cache)
    probe.check(base, probe.parts(prefill, decoder(probe.ids[:, _OWN:], probe.far, probe.context, cache, 1)))


def _prove_training(base: PreTrainedModel, passes: FusedTraining) -> None:
    """All own tokens at once: what is not kept in a cache computes the same."""
    probe = _Probe.of(base)
    positions = torch.cat([probe.positions, probe.far], dim=1)
    real = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9])  # of two rows of five, the second one without its padding
    hidden = passes.own(passes.embed(probe.ids), positions, probe.context, real)
    logits = passes.head.logits(hidden)
    probe.check(base, [logits[:4], logits[5:7], logits[[4, 7], None]])


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit; in 16 bits, where noise would hide it, the Euclidean norm
    of all of them, relative to that of the logits."""
    measure = torch.Tensor.norm if expected.element_size() < 4 else lambda x: x.abs().max()
    found, expected = found.float(), expected.float()
    return float(measure(found - expected) / measure(expected).clamp(min=1e-6))


# ---- when it serves -------------------------------------------------------------------------------------------------


class LazyDecoder:
    """The fused decoder and the fused training passes of one base, each planned at the first call that could use it.
    Thread-safe."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._plans: dict[str, FusedDecoder | str] = {}  # by the backend whose kernels they use
        self._training_plan: FusedTraining | str | None = None
        self._told: set[str] = set()

    def forget(self) -> None:
        """Plan anew: the base's weights, dtype, device or modules changed."""
        self._plans, self._training_plan = {}, None

    def get(self, backend: str | None) -> FusedDecoder | str:
        """What serves a plain inference call now, or the reason why the decoder is not fused."""
        if (why := self._why_not_asked(backend, "cpu", "cuda")) is not None:
            return why
        kernels = self._kernels(backend)
        known = self._plans.get(kernels)
        if known is None:
            with self._lock:
                known = self._plans.get(kernels)
                if known is None:
                    # Reasons that pass are not kept.
                    if self._base.training and has_dropout(self._base):
                        return "the base drops out in training mode"
                    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                        return "a CUDA graph is being captured, and a plan reads values"
                    if (why := BaseState(self._base).changed()) is not None:
                        return why
                    known = self._plans[kernels] = plan(self._base, kernels)
        if isinstance(known, FusedDecoder) and (why := known.why_not_now()) is not None:
            return why
        return known

    def get_training(self, backend: str | None) -> FusedTraining | str:
        """What serves a plain training call now, or the reason why its passes are not fused."""
        if (why := self._why_not_asked(backend, "cpu")) is not None:
            return why
        known = self._training_plan
        if known is None:
            with self._lock:
                known = self._training_plan
                if known is None:
                    if (why := BaseState(self._base).changed(harmless=CHECKPOINTING_HOOK)) is not None:
                        return why
                    known = self._training_plan = plan_training(self._base)
        if isinstance(known, FusedTraining) and (why := known.why_not_now()) is not None:
            return why
        return known

    def _kernels(self, backend: str | None) -> str:
        """The backend whose kernels a call's fused decoder uses: the one asked for, or what "auto" tries first."""
        if (name := requested(backend)) == "auto":
            name = heuristics.backend_order(self._base.device.type)[0]
        return "cuda" if name == "cuda" else "cpu"

    def _why_not_asked(self, backend: str | None, *served: str) -> str | None:
        if (name := requested(backend)) not in ("auto", *served):
            return f"backend {name!r} is asked for"
        return "autocast is on" if torch.is_autocast_enabled(self._base.device.type) else None

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
        differentiates = differentiated(embeds, prefix, () if self._plans else self._base.parameters())
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
