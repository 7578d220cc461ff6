# SPDX-License-Identifier: Apache-2.0
"""Which path a base model takes, found by running it rather than by its name.

A few tokens run once as a whole and once as "prefix, then own tokens"; the logits must agree. What five tokens can't
show (windows and chunks longer than that) is read from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_fast import expanded
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.packed import Compiled, pack
from softprompt_fast.prompt import BaseShape

_PREFIX, _OWN = 3, 2


def why_not_shared(base: PreTrainedModel, backend: str | None) -> str | None:
    """Install the prefix-aware attention function on `base` and try it. The reason why it can't be used, or None."""
    reason = hooks.install(base)
    if reason is None and "chunked_attention" in (getattr(_text_config(base), "layer_types", None) or ()):
        reason = "its attention is chunked by a mask, which a prefix would bypass"
    if reason is None and base.device.type != "meta":
        reason = _try(base, lambda view: _run_shared(view, backend))
    if reason is not None:
        hooks.uninstall(base)
    return reason


def why_not_expanded(base: PreTrainedModel) -> str | None:
    """The reason why `base` can't be served even with prefixes expanded into its cache, or None."""
    return None if base.device.type == "meta" else _try(base, _run_expanded)


def why_not_in_parts(base: PreTrainedModel, run: Callable[[PreTrainedModel, Tensor], Tensor]) -> str | None:
    """The reason why `run`, embeddings ``[1, S, H]`` -> logits ``[1, S, V]`` through parts of the base that it is
    given, does not give what `base` gives as a whole, or None."""
    return _try(base, lambda view: _differ(view, run(view, _embeddings(view))[:, _PREFIX:], "through its parts"))


def _try(base: PreTrainedModel, run: Callable[[PreTrainedModel], str | None]) -> str | None:
    try:
        with torch.no_grad(), hooks.evaluating(base) as view:
            return run(view)
    except BackendError:
        # A backend that was asked for by name never falls back.
        hooks.uninstall(base)
        raise
    except Exception as error:
        # Whatever an unknown architecture raises here only means that it can't take this path.
        return f"a probe failed: {type(error).__name__}: {error}"


def _text_config(base: PreTrainedModel):
    return base.config.get_text_config(decoder=True)


def _embeddings(base: PreTrainedModel) -> Tensor:
    embedding = base.get_input_embeddings()
    ids = torch.arange(1, 1 + _PREFIX + _OWN, device=base.device)[None] % embedding.num_embeddings
    return embedding(ids)


def _differ(base: PreTrainedModel, logits: Tensor, where: str = "behind a prefix") -> str | None:
    """How `logits` of the own tokens differ from those of the whole sequence run at once."""
    whole = base(inputs_embeds=_embeddings(base), use_cache=False).logits[:, _PREFIX:]
    error = float((logits - whole).abs().max() / whole.abs().max().clamp(min=1e-6))
    allowed = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    return None if error <= allowed else f"logits {where} differ from the whole by {error:.1e} (relative)"


def _run_shared(base: PreTrainedModel, backend: str | None) -> str | None:
    layers = list(range(hooks.num_attention_layers(base)))
    capture = hooks.CaptureContext()
    base(inputs_embeds=_embeddings(base)[:, :_PREFIX], use_cache=False, **{hooks.KEYWORD: capture})
    if missing := sorted(set(layers) - set(capture.keys)):
        return f"the prefix does not reach layers {missing}"
    heads = BaseShape.of(base).num_kv_heads
    seen = {key.shape[1] for key in capture.keys.values()}
    if heads is not None and seen != {heads}:
        return f"its attention function sees {sorted(seen)} key/value heads, its cache has {heads}"
    context = hooks.PrefixContext(
        keys=tuple(capture.keys[i][0] for i in layers),
        values=tuple(capture.values[i][0] for i in layers),
        backend=backend,
        options={},
    )
    logits = base(
        inputs_embeds=_embeddings(base)[:, _PREFIX:],
        attention_mask=hooks.no_mask(1, base.device),
        position_ids=torch.arange(_PREFIX, _PREFIX + _OWN, device=base.device)[None],
        use_cache=False,
        **{hooks.KEYWORD: context},
    ).logits
    asked = context.options or {}
    if sorted(asked) != layers:
        return "a layer runs without its prefix"
    if ignored := [i for i in _sliding_layers(base, layers) if asked[i]["sliding_window"] is None]:
        return f"the sliding window of layers {ignored} is applied by a mask, which a prefix would bypass"
    return _differ(base, logits)


def _sliding_layers(base: PreTrainedModel, layers: list[int]) -> list[int]:
    """The layers that the configuration says have a sliding window."""
    config = _text_config(base)
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False:
        return []
    types = getattr(config, "layer_types", None)
    return layers if types is None else [i for i in layers if types[i] == "sliding_attention"]


def _run_expanded(base: PreTrainedModel) -> str | None:
    embeddings = _embeddings(base)
    keys, values, _ = expanded.run_prompt(base, embeddings[:, :_PREFIX], 1)
    prefix = Compiled(tuple(key[0] for key in keys), tuple(value[0] for value in values), None)
    packed = pack([("probe", None)], [0], [prefix])
    out = expanded.forward(
        base,
        input_ids=None,
        inputs_embeds=embeddings[:, _PREFIX:],
        packed=packed,
        index=None,
        own_start=None,
        own_end=None,
        cache=None,
        use_cache=False,
        logits_to_keep=0,
    )
    return _differ(base, out.logits)
