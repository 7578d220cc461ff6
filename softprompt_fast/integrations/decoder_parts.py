# SPDX-License-Identifier: Apache-2.0
"""A llama-like decoder taken apart: what the fused passes know of a base, and what would make that wrong.

Which bases are llama-like is no list of names. A base is recognised by its structure (the layers' children and what
its norms and activation compute); each pass has to prove besides that it computes the same (``fused_decoder.plan``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel

from softprompt_fast.backends.norm import Norm
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.ops._checks import check_index, check_offsets, check_range
from softprompt_fast.versions import optimizer_steps

_SLEEPING = "transformers.utils.output_capturing"
_GLOBAL_HOOKS = [f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class UnservedError(Exception):
    """A base that the fused decoder can't serve; the message says why."""


@dataclass(frozen=True)
class LayerParts:
    """One layer's modules, its norms as the kernels take them, and what it asks of attention."""

    attention: Any
    mlp: Any
    norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    mlp_norm: Norm
    scale: float
    sliding_window: int | None
    softcap: float | None

    @property
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.attention.q_proj, self.attention.k_proj, self.attention.v_proj


class DecoderParts:
    """A llama-like decoder taken apart.

    Args:
        base: a base of the structure that :func:`check_structure` lets pass.
        asked: what each layer asks of attention (``PrefixContext.options``).

    Raises:
        UnservedError: the layers are not of one kind, or compute something else.
    """

    def __init__(self, base: PreTrainedModel, asked: Mapping[int, Mapping[str, Any]]) -> None:
        decoder: Any = base.model
        self.embed, self.rotary, self.head = decoder.embed_tokens, decoder.rotary_emb, base.lm_head
        first = decoder.layers[0].self_attn
        self.head_dim = int(first.head_dim)
        self.q_heads = first.q_proj.out_features // self.head_dim
        self.kv_heads = first.k_proj.out_features // self.head_dim
        self.activation = _activation(decoder.layers[0].mlp.act_fn)

        def layer(module: Any, asked: Mapping[str, Any]) -> LayerParts:
            attention, mlp = module.self_attn, module.mlp
            if asked["s_aux"] is not None:
                raise UnservedError("its attention has sinks")
            found = [getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")]
            if found != [count * self.head_dim for count in (self.q_heads, self.kv_heads, self.kv_heads)]:
                raise UnservedError("its layers' heads differ")
            if _activation(mlp.act_fn) != self.activation:
                raise UnservedError("its layers' activations differ")
            normed = hasattr(attention, "q_norm")
            return LayerParts(
                attention=attention,
                mlp=mlp,
                norm=_norm(module.input_layernorm),
                q_norm=_norm(attention.q_norm, self.head_dim) if normed else None,
                k_norm=_norm(attention.k_norm, self.head_dim) if normed else None,
                mlp_norm=_norm(module.post_attention_layernorm),
                scale=float(self.head_dim**-0.5 if asked["scaling"] is None else asked["scaling"]),
                sliding_window=asked["sliding_window"],
                softcap=asked["softcap"],
            )

        self.layers = [layer(module, asked[i]) for i, module in enumerate(decoder.layers)]
        self.norm = _norm(decoder.norm)

    def why_not_these(
        self, embeds: Tensor | None, prefix: Sequence[Tensor], quantized: Collection[torch.dtype] = ()
    ) -> str | None:
        """Why the kernels, which trust their pointers, can't take a call's embeddings and prefixes; None: they can.

        Args:
            quantized: the dtypes that an 8-bit prefix may have; none: it is floating.
        """
        weight = self.embed.weight
        given = prefix if embeds is None else [embeds, *prefix]
        floating = (weight.dtype,)
        for x in given:
            if (
                x.dtype not in (floating if x is embeds else quantized or floating)
                or x.device != weight.device
                or type(x) not in (Tensor, nn.Parameter)
            ):
                taken = f"{str(weight.dtype).removeprefix('torch.')} tensors on {weight.device}"
                return f"it takes {taken}, found {type(x).__name__} of {x.dtype} on {x.device}"
        if embeds is not None and embeds.shape[2] != self.embed.embedding_dim:
            return f"its embeddings have {self.embed.embedding_dim} features, found {embeds.shape[2]}"
        if prefix and any(x.shape != (self.kv_heads, prefix[0].shape[1], self.head_dim) for x in prefix):
            return f"a prefix has {self.kv_heads} heads of {self.head_dim}, found another shape"
        return None


def checked_rows(
    context: hooks.PrefixContext, batch: int, own: int, packed: int, device: torch.device
) -> tuple[Tensor | None, ...]:
    """The context's index tensors, dense and checked (their values too where those are in host memory): once a pass
    instead of once a layer."""
    names = ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start")
    rows = [getattr(context, name) for name in names]
    for name, index in zip(names, rows, strict=True):
        check_index(name, index, None if name == "prefix_offsets" else batch, device)
    offsets, prefix_index, own_start, own_end, _ = rows
    if device.type == "cpu":
        prefixes, _ = check_offsets("prefix_offsets", offsets, packed)
        check_range("prefix_index", prefix_index, -1, prefixes - 1)
        check_range("own_start", own_start, 0, own)
        check_range("own_end", own_end, 0, own)
    return tuple(None if index is None else index.contiguous() for index in rows)


def differentiated(embeds: Tensor | None, prefix: Sequence[Tensor], parameters: Iterable[Tensor] = ()) -> bool:
    """Whether a call now over these makes a graph."""
    if not torch.is_grad_enabled():
        return False
    given = prefix if embeds is None else [embeds, *prefix]
    return any(x.requires_grad for x in given) or any(x.requires_grad for x in parameters)


class BaseState:
    """What must stay as it was when a base was planned, held so that comparing takes microseconds."""

    def __init__(self, base: PreTrainedModel) -> None:
        modules = list(base.modules())
        self._config = base.config
        self._attributes = [module.__dict__ for module in modules]
        self._hooks = [
            table
            for m in modules
            for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._children = [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._tables = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        self.parameters = [table[name] for table, name in self._tables]
        # Inference tensors have no version counter; nothing but inference mode can write to them.
        self._counted = [p for p in self.parameters if not p.is_inference()]
        self._drops_out = has_dropout(base)
        self._weights = self._read_weights()

    def _read_weights(self) -> tuple[Any, ...]:
        # Fused optimizers write without counting versions, and `.data =` moves a parameter without counting either.
        steps = optimizer_steps() if any(p.requires_grad for p in self.parameters) else 0
        return steps, [p.data_ptr() for p in self.parameters], [p._version for p in self._counted]

    def weights_changed(self) -> bool:
        """Whether weights were written or moved since they were read."""
        return self._read_weights() != self._weights

    def _is_hooked(self, harmless: str | None) -> bool:
        # Once asked for hidden states, transformers leaves its hooks in place; they sleep until it is asked again.
        found = [hook for table in self._hooks if table for hook in table.values()]
        places = [(getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) for hook in found]
        return any(module != _SLEEPING and f"{module}.{name}" != harmless for module, name in places)

    def changed(self, *, harmless: str | None = None) -> str | None:
        """What changed, in words; None if nothing did. Hooks that are the function `harmless` (``module.name``) do not
        count."""
        if any(getattr(nn_module, name) for name in _GLOBAL_HOOKS) or self._is_hooked(harmless):
            return "a module of the base has hooks"
        if any("forward" in attributes for attributes in self._attributes):
            return "a module of the base has a forward of its own"
        if any(table != children for table, children in self._children):
            return "modules of the base were replaced"
        if any(table.get(name) is not p for (table, name), p in zip(self._tables, self.parameters, strict=True)):
            return "parameters of the base were replaced"
        if self.weights_changed():
            return "the base's weights changed since they were read; call invalidate()"
        if self._drops_out and any(attributes["training"] for attributes in self._attributes):
            return "the base drops out in training mode"
        if self._config.output_attentions or self._config.output_hidden_states:
            return "the base's config asks for attention weights or hidden states"
        return None


def has_dropout(base: PreTrainedModel) -> bool:
    """Whether any module, or the configuration, names a dropout that is not zero."""
    places = [vars(module) for module in base.modules()] + [base.config.to_dict()]
    named = (value for place in places for name, value in place.items() if "drop" in name)
    return any(isinstance(value, float) and value > 0.0 for value in named)


# ---- recognising a base ---------------------------------------------------------------------------------------------


def check_structure(base: PreTrainedModel) -> None:
    """Whether `base` has a llama-like decoder's modules.

    Raises:
        UnservedError: it does not.
    """
    _expect_children("the model", base, {"model", "lm_head"})
    model: Any = base.model
    _expect_children("its decoder", model, {"embed_tokens", "layers", "norm", "rotary_emb"})
    if not isinstance(model.embed_tokens, nn.Embedding) or type(base.lm_head) is not nn.Linear:
        raise UnservedError("its embeddings or its head are of another kind")
    if len(model.layers) != hooks.num_attention_layers(base) or not len(model.layers):
        raise UnservedError("its layers are not those of its configuration")
    for i, layer in enumerate(model.layers):
        _expect_children("a layer", layer, _LAYER)
        _expect_children("its attention", layer.self_attn, _ATTENTION, _ATTENTION | _HEAD_NORMS)
        _expect_children("its mlp", layer.mlp, _MLP)
        linears = [getattr(layer.self_attn, name) for name in _ATTENTION]
        linears += [getattr(layer.mlp, name) for name in _MLP - {"act_fn"}]
        if other := [type(m) for m in linears if type(m) is not nn.Linear]:
            raise UnservedError(f"a projection is no nn.Linear but a {other[0].__module__}.{other[0].__qualname__}")
        if getattr(layer.self_attn, "layer_idx", None) != i or not hasattr(layer.self_attn, "head_dim"):
            raise UnservedError("its attention layers are not numbered in order, or name no head_dim")


def _expect_children(what: str, module: nn.Module, *allowed: set[str]) -> None:
    found = set(dict(module.named_children()))
    if found not in allowed or module._parameters:
        names = ", ".join(sorted(found | set(module._parameters)))
        raise UnservedError(f"{what} is not llama-like: it holds {names}")


def _norm(module: Any, width: int | None = None) -> Norm:
    """A norm module as the kernels take it, if it computes what they would."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None or set(module._parameters) != {"weight"}:
        raise UnservedError(f"{type(module).__name__} is no RMS norm of one weight")
    if width is not None and weight.shape[0] != width:
        raise UnservedError(f"{type(module).__name__} normalises {weight.shape[0]} features, a head has {width}")
    # Of order one, and so small that eps tells.
    x = torch.linspace(-2.0, 3.0, weight.shape[0], device=weight.device)
    x = torch.stack([x, float(eps) ** 0.5 * x])
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if torch.allclose(module(x), normed * (weight.float() + offset), rtol=1e-5, atol=1e-5):
            return Norm("rms", weight.detach(), None, offset, float(eps))
    raise UnservedError(f"{type(module).__name__} is no RMS norm")


def _activation(module: Any) -> str:
    x = torch.linspace(-6.0, 6.0, 64)
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(module(x), activation(x), rtol=1e-5, atol=1e-6):
            return name
    raise UnservedError(f"activation {type(module).__name__} is not one of {', '.join(ACTIVATIONS)}")
