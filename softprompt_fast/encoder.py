# SPDX-License-Identifier: Apache-2.0
"""Soft prompts where they are no causal prefix: encoders, encoder-decoders, and task heads over a causal backbone.

In an encoder virtual tokens attend to own tokens as well, so an embedding prompt has no fixed keys and values: it runs
through the layers with every row, behind one fused concatenation. Prefix methods, and every prompt before a causal
backbone, are one prefix that all rows share.

A row's result depends on neither its neighbours nor its padding. Rows are packed so that all start (or, where the head
reads the last token, end) at the same column, which gives every token the position it has in the row alone; results go
back to the columns where the caller's tokens were.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from softprompt_fast.explanation import Explanation, LayerPath, serving_backend
from softprompt_fast.integrations import decoder_prefix as decoder
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.losses import IGNORE
from softprompt_fast.ops import prompt_concat
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.prompted import PromptArgument, PromptedModel
from softprompt_fast.row_layout import RowLayout

logger = logging.getLogger("softprompt_fast")


class EncoderSoftPromptModel(PromptedModel):
    """A frozen encoder (bert, roberta, ...), or a task head over a causal backbone, with named soft prompts.

    Args:
        base: a transformers model: ``...ForSequenceClassification``, ``...ForTokenClassification``,
            ``...ForQuestionAnswering``, or a bare backbone (FEATURE_EXTRACTION). Used as it is, not copied; where rows
            share a prefix, its attention implementation is replaced by one that computes the same without a prompt.
        backend: force one backend of the ops; None picks automatically.
        freeze_base: turn the base's gradients off, as PEFT does; a prompt's own head trains on a copy.

    Results equal PEFT's on each row alone and unpadded, with outputs for own tokens only: ``logits`` of a token
    classifier are ``[B, S, num_labels]`` and ``last_hidden_state`` is ``[B, S, H]`` (zeros at padding), where PEFT
    gives P + S. A pooled head reads what it reads in PEFT: for an embedding prompt on bert or roberta the first
    virtual token. Rows with different prompts run as one batch per prompt, because each adapter brings its own head.

    Raises:
        TypeError: `base` is no transformers model, or is an encoder-decoder.
    """

    _is_encoder_decoder = False

    def __init__(self, base: PreTrainedModel, *, backend: str | None = None, freeze_base: bool = True) -> None:
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"base: expected a transformers model, found {type(base).__name__}")
        if bool(base.config.is_encoder_decoder) != self._is_encoder_decoder:
            wanted = "an encoder-decoder" if self._is_encoder_decoder else "no encoder-decoder"
            raise TypeError(f"base: expected {wanted}, found {type(base).__name__}")
        super().__init__(base, backend=backend, freeze_base=freeze_base)
        self.heads = nn.ModuleDict()  # trainable modules_to_save of each prompt
        self._why_expanded: str | None = None
        # Heads that read the last token (PEFT and transformers call them `score`) need rows that end together.
        self._at_end = hasattr(base, "score")
        # Attention functions go by the modules' attribute, and a family without it is not known to be causal; masks go
        # by the config's, which makes encoders of decoders.
        causal = getattr(base.config.get_text_config(), "is_causal", True)
        self._causal = causal and any(getattr(module, "is_causal", False) for module in base.modules())
        # Roberta and its kin count positions from padding_idx + 1.
        counting = (m for m in base.modules() if hasattr(m, "create_position_ids_from_input_ids"))
        self._first_position = next((m.padding_idx + 1 for m in counting), 0)

    # ---- prompts -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel,
        adapter: str | os.PathLike[str] | None = None,
        *,
        prompt_name: str = "default",
        trainable: bool = False,
        backend: str | None = None,
    ) -> EncoderSoftPromptModel:
        """A model with one prompt, read from a PEFT adapter directory (PEFT need not be installed)."""
        model = cls(base, backend=backend)
        if adapter is not None:
            model.load_prompt(prompt_name, adapter, trainable=trainable)
        return model

    def load_prompt(
        self, name: str, directory: str | os.PathLike[str], *, trainable: bool = False, replace: bool = False
    ) -> None:
        """Load a PEFT adapter directory, with the head trained along with it, under `name`.

        With `trainable` both the prompt and its head require grad and are among ``self.parameters()``.
        """
        prompt = peft_io.load_adapter(directory, trainable=trainable)
        if trainable:
            prompt.modules_to_save = {name: nn.Parameter(head) for name, head in prompt.modules_to_save.items()}
        self.add_prompt(name, prompt, replace=replace)

    def add_prompt(self, name: str, prompt: SoftPrompt, *, replace: bool = False) -> None:
        """Put a prompt under `name`. The first one becomes the active prompt.

        Raises:
            TypeError: `prompt` is no SoftPrompt (a PrefixKV is compiled for a causal LM).
            ValueError: `name` is taken; the prompt doesn't fit the base model (expected and found are named); PEFT has
                no such method for this kind of model.
        """
        if not isinstance(prompt, SoftPrompt):
            raise TypeError(f"prompt: expected a SoftPrompt, found {type(prompt).__name__}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, found {name!r}")
        if name in self._keys and not replace:
            raise ValueError(f"name: a prompt called {name!r} is already loaded; pass replace=True to replace it")
        peft_io.check_compatible(prompt, self.base)
        self._check_served(prompt)
        self._view(prompt)  # raises where its modules_to_save don't fit
        if self._why_not_shared(prompt) is None and (reason := self._install(self.base)) is not None:
            self._expand_because(reason)
        was_active = self.active_prompt == name
        if name in self._keys:
            self.remove_prompt(name)
        key = self._register_prompt(name, prompt.to(self.base.device))
        self.heads[key] = nn.ParameterList(
            head for head in prompt.modules_to_save.values() if isinstance(head, nn.Parameter) and head.requires_grad
        )
        if was_active or self.active_prompt is None:
            self.active_prompt = name

    def remove_prompt(self, name: str) -> None:
        """Drop a prompt; if it was the active one, none is."""
        self.get_prompt(name)
        key = self._keys.pop(name)
        del self.prompts[key], self.heads[key]
        if self.active_prompt == name:
            self.active_prompt = None

    @property
    def prompt_names(self) -> list[str]:
        return list(self._keys)

    def get_prompt(self, name: str) -> SoftPrompt:
        """The prompt called `name`; KeyError with the known names if there is none."""
        if name not in self._keys:
            known = ", ".join(map(repr, self._keys)) or "none is loaded"
            raise KeyError(f"prompt: unknown prompt {name!r}; known prompts: {known}")
        return self.prompts[self._keys[name]]  # type: ignore[return-value]

    def explain(self) -> Explanation:
        """The path of every layer, for the kinds of prompt that are loaded."""
        paths = dict.fromkeys(self._path(self.get_prompt(name)) for name in self._keys)
        paths = paths or {("no prompt is loaded", "transformers", ""): None}
        path, backend, reason = (" + ".join(dict.fromkeys(filter(None, part))) for part in zip(*paths, strict=True))
        layers = range(hooks.num_attention_layers(self.base))
        return Explanation(type(self.base).__name__, tuple(LayerPath(i, path, backend, reason) for i in layers))

    def _path(self, prompt: SoftPrompt) -> tuple[str, str, str]:
        """Path, backend and reason of one prompt."""
        where, why = self._where(prompt), self._why_not_shared(prompt)
        if why is None:
            return where + "shared prefix", *serving_backend("prefix_attention", self.device.type, self.backend)
        if prompt.kind == "prefix":
            return where + "expanded prefix", "transformers", why
        backend, _ = serving_backend("prompt_concat", self.device.type, self.backend)
        return where + "virtual tokens in every row", backend, why

    def _why_not_shared(self, prompt: SoftPrompt) -> str | None:
        """None where all rows share one prefix. Behind causal attention an embedding prompt becomes one as well."""
        if prompt.kind == "embedding":
            if not self._causal:
                return "its attention isn't causal, or not known to be"
            if hasattr(self.base, "qa_outputs"):
                return "virtual tokens compete for the span"
        return self._why_expanded

    def _where(self, prompt: SoftPrompt) -> str:
        return ""

    def _check_served(self, prompt: SoftPrompt) -> None:
        if prompt.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or prompt.method == "CPT":
            raise ValueError(
                f"task_type: {type(self.base).__name__} takes prompts for SEQ_CLS, TOKEN_CLS, QUESTION_ANS or "
                f"FEATURE_EXTRACTION, found {prompt.method} for {prompt.task_type}"
            )
        if prompt.kind == "prefix":
            backbone = self.base.base_model
            if "past_key_values" not in inspect.signature(backbone.forward).parameters:
                # PEFT refuses such classifiers; on a bare encoder it computes without the prefix and says nothing.
                raise ValueError(
                    f"{prompt.method}: {type(backbone).__name__} takes no past_key_values, hence no prefix"
                )

    @staticmethod
    def _install(base: PreTrainedModel) -> str | None:
        return hooks.install(base)

    def _view(self, prompt: SoftPrompt | None) -> PreTrainedModel:
        return with_tensors(self.base, {} if prompt is None else prompt.modules_to_save)

    # ---- which prompt for which row ------------------------------------------------------------------------------

    def _groups(self, prompt: Any, batch: int) -> Iterator[tuple[str | None, Tensor | None]]:
        """Each distinct prompt with the rows that use it (None: all rows)."""
        names = self._row_names(prompt, batch)
        # transformers pools the last token of a batch only where the config names a pad token.
        alone = self._at_end and batch > 1 and self.config.get_text_config().pad_token_id is None
        keys = list(enumerate(names)) if alone else names
        distinct = dict.fromkeys(keys)
        for key in distinct:
            rows = None
            if len(distinct) > 1:
                rows = torch.tensor([i for i, k in enumerate(keys) if k == key], device=self.device)
            yield (key[1] if isinstance(key, tuple) else key), rows

    def _by_prompt(self, prompt: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        """Run every prompt's rows as a batch of its own and put the results back in order."""
        return_dict = options.pop("return_dict", None)
        refused = [key for key in ("past_key_values", "encoder_outputs", "is_causal") if options.get(key) is not None]
        refused += [key for key in ("output_attentions",) if options.get(key)]
        if refused:
            raise ValueError(f"{refused[0]}: not supported by {type(self).__name__}.forward; expected None")
        batch = _check_inputs(inputs)
        outputs, row_lists, weights = [], [], []
        for name, rows in self._groups(prompt, batch):
            part = inputs if rows is None else {k: None if v is None else v[rows] for k, v in inputs.items()}
            output = self._run(None if name is None else self.get_prompt(name), part, dict(options))
            if rows is None:
                return output.to_tuple() if return_dict is False else output
            outputs.append(output)
            row_lists.append(rows)
            weights.append(_loss_weight(part))
        output = _join(outputs, torch.cat(row_lists).argsort(), weights)
        return output.to_tuple() if return_dict is False else output

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        prompt: PromptArgument = ...,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass over own tokens with their prompts.

        Args:
            input_ids: int64 ``[B, S]`` own tokens (or ``inputs_embeds`` ``[B, S, H]``).
            attention_mask: ``[B, S]``, zeros only at the ends of a row (padding).
            token_type_ids: int64 ``[B, S]``; virtual tokens get 0. Ignored for FEATURE_EXTRACTION, as in PEFT.
            position_ids: int64 ``[B, S]``, positions in the row alone, without the prompt. Refused with an embedding
                prompt, for which PEFT ignores them.
            labels: as the base takes them; of a token classifier ``[B, S]`` over own tokens.
            start_positions, end_positions: int64 ``[B]``, columns of ``input_ids`` (PEFT counts virtual tokens too).
            prompt: name for the batch, one name or None per row, or None; left out: the active prompt.
            task_ids: int64 ``[B]``, for multitask prompts.

        Returns:
            The base model's output class. ``start_logits`` and ``end_logits`` hold the dtype's minimum at padding.

        Raises:
            ValueError: shapes that don't match, a mask with holes, too many positions, ``is_causal``, which is the
                base's to say.
            KeyError: unknown prompt (the message lists the known ones).
            IndexError: a token id outside the vocabulary.
        """
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "task_ids": task_ids,
        }
        return self._by_prompt(prompt, inputs, kwargs)

    def _run(self, prompt: SoftPrompt | None, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        base = self._view(prompt)
        ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
        tokens = ids if embeds is None else embeds
        layout = RowLayout.of(
            inputs["attention_mask"], tokens.shape[:2], tokens.device, at_end=self._at_end, name="attention_mask"
        )
        virtual = 0 if prompt is None else prompt.num_virtual_tokens
        self._check_positions(virtual + layout.packed, virtual)
        types, positions = inputs["token_type_ids"], inputs["position_ids"]
        if types is not None and prompt is not None and prompt.task_type == "FEATURE_EXTRACTION":
            logger.warning("token_type_ids: ignored for FEATURE_EXTRACTION, as PEFT does")
            types = None

        prefix = None
        if prompt is not None and (prompt.kind == "prefix" or self._why_not_shared(prompt) is None):
            prefix = self._prefix(base, prompt, inputs["task_ids"], types is not None)
        # Virtual tokens that stand among the hidden states: none where they are a prefix.
        front = 0 if prefix is not None else virtual

        call = {**options, "attention_mask": layout.mask(front)}
        if prompt is None or prompt.kind == "prefix":
            call["input_ids" if embeds is None else "inputs_embeds"] = self._packed(layout, tokens)
        elif prefix is None:
            call["inputs_embeds"] = _concat(base, layout, tokens, prompt.embeddings(inputs["task_ids"]), self.backend)
        else:
            # As embeddings, because a head that looks for the last real id would take a final pad token for padding.
            call["inputs_embeds"] = layout.pack(tokens if embeds is not None else base.get_input_embeddings()(ids))
        if types is not None:
            call["token_type_ids"] = pad(layout.pack(types), (front, 0))
        if positions is not None:
            if prompt is not None and prompt.kind == "embedding":
                raise ValueError("position_ids: not supported with an embedding prompt, expected None")
            call["position_ids"] = layout.pack(positions) + virtual
        elif self._at_end or prefix is not None:
            call["position_ids"] = layout.positions(front, self._first_position + virtual - front)
        if self._causal:
            call["use_cache"] = False
        labels = inputs["labels"]
        if labels is not None:
            call["labels"] = layout.pack_labels(labels, front) if self._labels_tokens(labels, layout) else labels

        output = base(**call) if prefix is None else self._behind(prefix, base, layout, call)
        if output is None:  # just found out that nothing is shared
            return self._run(prompt, inputs, options)
        return _own_tokens(output, layout, inputs["start_positions"], inputs["end_positions"])

    def _prefix(
        self, base: PreTrainedModel, prompt: SoftPrompt, task_ids: Tensor | None, with_types: bool
    ) -> hooks.PrefixContext | None:
        """The prompt as keys and values; None where an embedding prompt can't become that.

        An embedding prompt runs through the layers once a call (for a multitask prompt, once a task in the batch),
        differentiably.
        """
        if prompt.kind == "prefix":
            keys, values = _key_values(prompt, self.base)
            return hooks.PrefixContext(keys, values, causal=self._causal, backend=self.backend)
        index = offsets = None
        if task_ids is not None and prompt.method == "MULTITASK_PROMPT_TUNING":
            task_ids, index = task_ids.unique(return_inverse=True)
        embeds = prompt.embeddings(task_ids).to(self.base.device, self.base.dtype)
        embeds = embeds if embeds.dim() == 3 else embeds[None]
        tasks, virtual = embeds.shape[:2]
        types = {"token_type_ids": embeds.new_zeros(tasks, virtual, dtype=torch.long)} if with_types else {}
        capture = hooks.CaptureContext()
        base.base_model(inputs_embeds=embeds, use_cache=False, **types, **{hooks.KEYWORD: capture})
        layers = range(hooks.num_attention_layers(self.base))
        if set(capture.keys) != set(layers):
            self._expand_because("its layers don't hand keyword arguments down to the attention function")
            return None
        if index is not None:
            index = index.to(self.device, torch.int32)
            offsets = torch.arange(0, (tasks + 1) * virtual, virtual, dtype=torch.int32, device=self.device)
        # [N, Hkv, P, D] -> [Hkv, N * P, D]
        keys = tuple(capture.keys[i].transpose(0, 1).flatten(1, 2) for i in layers)
        values = tuple(capture.values[i].transpose(0, 1).flatten(1, 2) for i in layers)
        return hooks.PrefixContext(keys, values, offsets, index, causal=True, backend=self.backend)

    def _behind(
        self, prefix: hooks.PrefixContext, base: PreTrainedModel, layout: RowLayout, call: dict[str, Any]
    ) -> Any:
        """The base's output for packed rows behind `prefix`; None if its layers turn out not to see it."""
        keys, values = prefix.keys or (), prefix.values or ()
        if self._why_expanded is not None:
            self._check_cache_is_used()
            mask = pad(call["attention_mask"], (keys[0].shape[1], 0), value=1)
            past = _expanded_cache(keys, values, len(layout.length))
            return base(**{**call, "attention_mask": mask, "past_key_values": past})
        if not layout.full:
            bound = (layout.first if self._at_end else layout.length).to(torch.int32)
            prefix.own_start, prefix.own_end = (bound, None) if self._at_end else (None, bound)
        prefix.options = {}
        # The own tokens' mask goes along: a layer that misses the prefix then runs without it, and is found out here.
        output = base(**call, **{hooks.KEYWORD: prefix})
        if set(prefix.options) != set(range(len(keys))):
            self._expand_because("its layers don't hand keyword arguments down to the attention function")
        elif not self._causal and any(asked["sliding_window"] for asked in prefix.options.values()):
            self._expand_because("its sliding window looks both ways")
        else:
            return output
        return None

    def _packed(self, layout: RowLayout, tokens: Tensor) -> Tensor:
        """Packed tokens; ids at padding become the pad token, by which causal backbones find the last real one."""
        packed = layout.pack(tokens)
        pad_id = self.config.get_text_config().pad_token_id
        if self._at_end and tokens.dim() == 2 and pad_id is not None and not layout.full:
            packed = packed.masked_fill(layout.mask(0) == 0, pad_id)
        return packed

    def _labels_tokens(self, labels: Tensor, layout: RowLayout) -> bool:
        """Whether `labels` are one per token; those of a sequence classifier can have the same shape."""
        one_per_token = labels.dim() == 2 and not labels.is_floating_point() and labels.shape[1] == layout.width
        return one_per_token and "ForSequenceClassification" not in type(self.base).__name__

    def _expand_because(self, reason: str) -> None:
        self._why_expanded = reason
        logger.warning("%s: rows share no prefix (exact, slower): %s", type(self.base).__name__, reason)

    def _check_positions(self, needed: int, virtual: int, name: str = "input_ids") -> None:
        limit = hooks.position_limit(self.base)
        if limit is not None and needed > limit.positions - self._first_position:
            raise ValueError(
                f"{name}: {virtual} virtual tokens and {needed - virtual} own tokens make {needed} positions, but "
                f"{limit.why}" + (f" and starts at {self._first_position}" if self._first_position else "")
            )

    def _check_cache_is_used(self) -> None:
        if hooks.drops_cache(self.base):
            raise ValueError(
                f"gradient checkpointing: it drops the cache that holds the prefix of {type(self.base).__name__}, "
                f"whose rows can't share one ({self._why_expanded}); call gradient_checkpointing_disable() on the base"
            )


class EncoderDecoderSoftPromptModel(EncoderSoftPromptModel):
    """A frozen encoder-decoder (t5, bart, ...) with named soft prompts for SEQ_2_SEQ_LM.

    PROMPT_TUNING and P_TUNING put virtual tokens before the encoder's tokens. MULTITASK_PROMPT_TUNING puts some before
    the decoder's as well, but not in :meth:`generate`: PEFT generates without them, and so does this. PREFIX_TUNING
    and CARTRIDGE are keys and values of the decoder's self-attention, one prefix for all rows.

    ``logits`` are ``[B, T, V]`` for own decoder tokens; encoder states are those of own tokens. Arguments and errors
    are as in :class:`EncoderSoftPromptModel`.
    """

    _is_encoder_decoder = True

    def __init__(self, base: PreTrainedModel, *, backend: str | None = None, freeze_base: bool = True) -> None:
        super().__init__(base, backend=backend, freeze_base=freeze_base)
        self._at_end = self._causal = False  # of the encoder
        self.generation_config = getattr(base, "generation_config", None)

    def _check_served(self, prompt: SoftPrompt) -> None:
        if prompt.task_type != "SEQ_2_SEQ_LM":
            raise ValueError(
                f"task_type: {type(self.base).__name__} takes prompts for SEQ_2_SEQ_LM, found {prompt.task_type}"
            )
        layers = hooks.num_attention_layers(self.base)
        if prompt.kind == "prefix" and prompt.config["num_layers"] != layers:
            raise ValueError(f"num_layers: expected {layers} (decoder layers), found {prompt.config['num_layers']}")

    def _where(self, prompt: SoftPrompt) -> str:
        if prompt.kind == "prefix":
            return "decoder: "
        return "encoder and decoder: " if _prompts_decoder(prompt) else "encoder: "

    @staticmethod
    def _install(base: PreTrainedModel) -> str | None:
        return decoder.install(base)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt: PromptArgument = ...,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of encoder and decoder, for training and scoring; :meth:`generate` decodes step by step.

        Args:
            input_ids: int64 ``[B, S]`` (or ``inputs_embeds``), attention_mask ``[B, S]``: the encoder's own tokens.
            decoder_input_ids: int64 ``[B, T]`` (or ``decoder_inputs_embeds``); left out: `labels` shifted right.
            decoder_attention_mask: ``[B, T]``, zeros only at the ends of a row.
            labels: int64 ``[B, T]``, -100 where no loss is wanted.
        """
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
            "task_ids": task_ids,
        }
        if decoder_input_ids is None and decoder_inputs_embeds is None and labels is None:
            raise ValueError("decoder_input_ids: expected them, decoder_inputs_embeds or labels, found none")
        return self._by_prompt(prompt, inputs, kwargs)

    def _run(self, prompt: SoftPrompt | None, inputs: dict[str, Any], call: dict[str, Any]) -> Any:
        base = self._view(prompt)
        layout, encoder, decoder_prompt = self._encoder_inputs(base, prompt, inputs)
        labels, embeds = inputs["labels"], inputs["decoder_inputs_embeds"]
        tokens = inputs["decoder_input_ids"] if embeds is None else embeds
        shape = (labels if tokens is None else tokens).shape[:2]
        own = RowLayout.of(
            inputs["decoder_attention_mask"], shape, layout.length.device, name="decoder_attention_mask"
        )
        if tokens is None:
            packed = base.prepare_decoder_input_ids_from_labels(own.pack_labels(labels, 0))
        else:
            packed = own.pack(tokens)

        is_prefix = prompt is not None and prompt.kind == "prefix"
        front = 0 if decoder_prompt is None else decoder_prompt.shape[-2]
        virtual = prompt.num_virtual_tokens if prompt is not None and is_prefix else front
        self._check_positions(virtual + own.packed, virtual, "decoder_input_ids")
        # Rows start at column 0, so causality alone keeps padding out of sight: no decoder_attention_mask.
        if decoder_prompt is not None:
            aligned = RowLayout.of(None, packed.shape[:2], packed.device, name="decoder_input_ids")
            call["decoder_inputs_embeds"] = _concat(base, aligned, packed, decoder_prompt, self.backend)
        else:
            call["decoder_input_ids" if packed.dim() == 2 else "decoder_inputs_embeds"] = packed
        if labels is not None:
            call["labels"] = own.pack_labels(labels, front)
        call.update(encoder, use_cache=False)

        output = self._decode(base, prompt, call) if prompt is not None and is_prefix else base(**call)
        fields = {
            name: value
            if name == "loss"
            else _map_tensors((layout if name.startswith("encoder") else own).unpack, value)
            for name, value in output.items()
            if name != "past_key_values"
        }
        return type(output)(**fields)

    def _encoder_inputs(
        self, base: PreTrainedModel, prompt: SoftPrompt | None, inputs: dict[str, Any]
    ) -> tuple[RowLayout, dict[str, Tensor], Tensor | None]:
        """The encoder's packed rows, its arguments, and the decoder's virtual tokens ``[(B,) P, H]`` if it has any."""
        ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
        tokens = ids if embeds is None else embeds
        layout = RowLayout.of(inputs["attention_mask"], tokens.shape[:2], tokens.device, name="attention_mask")
        if prompt is None or prompt.kind == "prefix":
            self._check_positions(layout.packed, 0)
            encoder = {"input_ids" if embeds is None else "inputs_embeds": layout.pack(tokens)}
            return layout, {**encoder, "attention_mask": layout.mask(0)}, None
        front = prompt.num_virtual_tokens
        self._check_positions(front + layout.packed, front)
        table = prompt.embeddings(inputs["task_ids"])
        encoder = {"inputs_embeds": _concat(base, layout, tokens, table[..., :front, :], self.backend)}
        decoder_prompt = table[..., front:, :] if _prompts_decoder(prompt) else None
        return layout, {**encoder, "attention_mask": layout.mask(front)}, decoder_prompt

    def _decode(self, base: PreTrainedModel, prompt: SoftPrompt, call: dict[str, Any]) -> Any:
        context = decoder.DecoderPrefix(*_key_values(prompt, self.base), decoder.relative_bias(base), self.backend)
        batch = len(call["attention_mask"])
        if self._why_expanded is None:
            output = base(**call, past_key_values=self._first_cache(context, batch), **{hooks.KEYWORD: context})
            if self._reached(context):
                return output
        self._check_cache_is_used()
        return base(**call, past_key_values=self._first_cache(context, batch))

    def _reached(self, context: decoder.DecoderPrefix) -> bool:
        """Whether every layer attended to its prefix; if not, prefixes are expanded from now on."""
        if context.reached != set(range(len(context.keys))):
            self._expand_because("its decoder layers don't hand keyword arguments down to the attention function")
        return self._why_expanded is None

    def _first_cache(self, context: decoder.DecoderPrefix, batch: int) -> decoder.PositionedCache:
        """The cache before the first own token: it counts the shared prefix, or holds the expanded one."""
        if self._why_expanded is None:
            return decoder.PositionedCache(DynamicCache(), DynamicCache(), offset=context.length)
        return decoder.PositionedCache(_expanded_cache(context.keys, context.values, batch), DynamicCache())

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        prompt: PromptArgument = ...,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with prompts; `kwargs` are its arguments (sampling, beams, streamers, ...).

        Rows with different prompts are generated one prompt after the other, then padded on the right to one length
        with the pad token.

        Raises:
            ValueError: as :meth:`forward`; ``return_dict_in_generate`` with several prompts; a static cache with a
                prefix prompt; a ``decoder_attention_mask``, a cache or ``is_causal`` handed in.
        """
        for name in ("decoder_attention_mask", "past_key_values", "encoder_outputs", "is_causal"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported by {type(self).__name__}.generate; expected None")
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "task_ids": task_ids,
        }
        batch = _check_inputs(inputs)
        results, row_lists = [], []
        for owner, rows in self._groups(prompt, batch):
            part = inputs if rows is None else {k: None if v is None else v[rows] for k, v in inputs.items()}
            result = self._generate(None if owner is None else self.get_prompt(owner), part, kwargs)
            if rows is None:
                return result
            if not isinstance(result, Tensor):
                raise ValueError("return_dict_in_generate: expected one prompt for the batch, found several")
            results.append(result)
            row_lists.append(rows)
        order = torch.cat(row_lists).argsort()
        pad_id = kwargs.get("pad_token_id", self.base.generation_config.pad_token_id)
        longest = max(result.shape[1] for result in results)
        padded = [pad(result, (0, longest - result.shape[1]), value=pad_id or 0) for result in results]
        copies = sum(map(len, results)) // batch  # num_return_sequences
        return torch.cat(padded).view(batch, copies, longest)[order].flatten(0, 1)

    @torch.no_grad()
    def _generate(self, prompt: SoftPrompt | None, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        base = self._view(prompt)
        _, call, _ = self._encoder_inputs(base, prompt, inputs)
        if inputs["decoder_input_ids"] is not None:
            call["decoder_input_ids"] = inputs["decoder_input_ids"]
        if prompt is None or prompt.kind == "embedding":
            return base.generate(**call, **options)
        config = options.get("generation_config") or base.generation_config
        cache = options.get("cache_implementation", config.cache_implementation)
        if cache is not None:
            raise ValueError(f"cache_implementation: expected None with a prefix prompt, found {cache!r}")
        context = decoder.DecoderPrefix(*_key_values(prompt, self.base), decoder.relative_bias(base), self.backend)
        self._start_from(base, context)
        result = base.generate(**call, **options)
        if self._why_expanded is None and not self._reached(context):
            return self._generate(prompt, inputs, options)
        return result

    def _start_from(self, base: PreTrainedModel, context: decoder.DecoderPrefix) -> None:
        """Let `base`, a view that only this call holds, start every decoding behind the prefix."""
        prepare = base.prepare_inputs_for_generation

        def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = prepare(*args, **kwargs)
            batch, new = inputs["decoder_input_ids"].shape
            past = inputs.get("past_key_values")
            if not isinstance(past, decoder.PositionedCache) or not inputs.get("use_cache", True):
                past = self._first_cache(context, batch)
            self._check_positions(past.get_seq_length() + new, context.length, "max_new_tokens")
            shared = {hooks.KEYWORD: context} if self._why_expanded is None else {}
            return {**inputs, "past_key_values": past, **shared}

        base.prepare_inputs_for_generation = prepare_inputs_for_generation


# ---- helpers -----------------------------------------------------------------------------------------------------


def with_tensors(base: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A view of `base` in which `tensors` stand where parameters of those names do. `base` is not touched.

    Modules on the way to a replaced parameter are copied shallowly and everything else is shared, so a view costs
    microseconds and is nobody else's. A live PEFT model's ModulesToSaveWrapper is seen through to the module it wraps.

    Raises:
        ValueError: `base` has no such parameter, or of another shape (expected and found are named).
    """
    view = _with_own_tables(base)
    fresh = {id(view)}

    def descend(path: str) -> nn.Module:
        module: nn.Module = view
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                raise ValueError(f"modules_to_save: {type(base).__name__} has no module {path!r}")
            if id(child) not in fresh:
                child = _with_own_tables(getattr(child, "original_module", child))
                fresh.add(id(child))
                module._modules[part] = child
            module = child
        return module

    for name, module in base.named_modules():
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            descend(name)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        parameters = descend(path)._parameters
        old = parameters.get(leaf)
        if old is None or old.shape != tensor.shape:
            expected = "none" if old is None else list(old.shape)
            raise ValueError(f"modules_to_save: {name}: the base has {expected}, the adapter {list(tensor.shape)}")
        parameters[leaf] = tensor.to(old.device, old.dtype)  # type: ignore[assignment]
    return view


def _with_own_tables(module: Any) -> Any:
    return hooks.shallow_copy(module, _modules={**module._modules}, _parameters={**module._parameters})


def _prompts_decoder(prompt: SoftPrompt) -> bool:
    return prompt.method == "MULTITASK_PROMPT_TUNING" and prompt.num_transformer_submodules == 2


def _key_values(prompt: SoftPrompt, base: PreTrainedModel) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    pairs = [(k.to(base.device, base.dtype), v.to(base.device, base.dtype)) for k, v in prompt.key_values()]
    return tuple(k for k, _ in pairs), tuple(v for _, v in pairs)


def _expanded_cache(keys: Sequence[Tensor], values: Sequence[Tensor], batch: int) -> DynamicCache:
    """The prefix as an ordinary cache, every row with its own copy."""
    rows = (batch, -1, -1, -1)
    return DynamicCache([(k.expand(rows), v.expand(rows)) for k, v in zip(keys, values, strict=True)])


def _concat(base: PreTrainedModel, layout: RowLayout, tokens: Tensor, prompt: Tensor, backend: str | None) -> Tensor:
    """``[B, P + packed, H]``: the embeddings of `prompt` ``[P, H]`` or ``[B, P, H]`` before those of packed tokens."""
    tokens = layout.pack(tokens)
    embedding = base.get_input_embeddings()
    table = None
    if tokens.dim() == 2:
        if type(embedding).forward is nn.Embedding.forward:
            table = embedding.weight
        else:  # bart scales inside its module
            tokens = embedding(tokens)
    index = offsets = None
    virtual = prompt.shape[-2]
    if prompt.dim() == 3:
        batch = len(prompt)
        index = torch.arange(batch, dtype=torch.int32, device=prompt.device)
        offsets = torch.arange(0, (batch + 1) * virtual, virtual, dtype=torch.int32, device=prompt.device)
        prompt = prompt.flatten(0, 1)
    return prompt_concat(
        tokens,
        table,
        prompt,
        prompt_offsets=offsets,
        prompt_index=index,
        prompt_length=virtual,
        own_start=layout.first.to(torch.int32) if layout.at_end else None,
        padding_side="left" if layout.at_end else "right",
        backend=backend,
    )


def _check_inputs(inputs: Mapping[str, Any]) -> int:
    """Batch size of per-row arguments.

    Raises:
        ValueError: neither or both of ids and embeddings; wrong rank; an empty batch; rows that differ in number.
    """
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
    tokens, name, rank = (ids, "input_ids", 2) if embeds is None else (embeds, "inputs_embeds", 3)
    if tokens.dim() != rank or 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name}: expected {rank} dimensions, at least one row and one token, found {list(tokens.shape)}"
        )
    for name, value in inputs.items():
        if value is not None and (not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(tokens)):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a tensor with {len(tokens)} rows, found {found}")
    return len(tokens)


def _map_tensors(function: Any, value: Any) -> Any:
    return tuple(function(v) for v in value) if isinstance(value, tuple) else function(value)


def _own_tokens(output: Any, layout: RowLayout, start: Tensor | None, end: Tensor | None) -> Any:
    """`output` with per-token results at the caller's columns, and with the loss of span labels if there are any."""
    fields: dict[str, Any] = {}
    for name, value in output.items():
        if name == "past_key_values":
            continue
        if name in ("start_logits", "end_logits"):
            value = layout.unpack(value, torch.finfo(value.dtype).min)
        elif name in ("last_hidden_state", "hidden_states") or (name == "logits" and value.dim() == 3):
            value = _map_tensors(layout.unpack, value)
        fields[name] = value
    if start is not None and end is not None and "start_logits" in output:
        losses = [_span_loss(output[n], layout, at) for n, at in (("start_logits", start), ("end_logits", end))]
        fields = {"loss": sum(losses) / 2, **fields}
    return type(output)(**fields)


def _span_loss(logits: Tensor, layout: RowLayout, position: Tensor) -> Tensor:
    """Cross-entropy of one end of a span; logits ``[B, front + packed]``, position ``[B]`` a caller's column.

    As in transformers a position outside the row is ignored; virtual tokens compete for the span as they do in PEFT.
    """
    front = logits.shape[1] - layout.packed
    column = position.view(-1) - layout.shift
    inside = (column >= layout.first) & (column < layout.first + layout.length)
    logits = logits.masked_fill(layout.mask(front) == 0, float("-inf"))
    return cross_entropy(logits, torch.where(inside, column + front, IGNORE), ignore_index=IGNORE)


def _loss_weight(inputs: Mapping[str, Any]) -> int:
    """How many terms the mean loss of these rows has: what it weighs in the mean over the whole batch."""
    labels = inputs["labels"]
    if labels is None:
        labels = inputs.get("start_positions")
    if labels is None:
        return 0
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())


def _join(outputs: list[Any], order: Tensor, weights: list[int]) -> Any:
    """One output of several, rows back in the order of the batch."""
    fields: dict[str, Any] = {}
    for name, first in outputs[0].items():
        values = [output[name] for output in outputs]
        if name == "loss":
            terms = [loss * weight for loss, weight in zip(values, weights, strict=True) if weight]
            fields[name] = sum(terms) / sum(weights) if terms else first
        elif isinstance(first, tuple):
            fields[name] = tuple(torch.cat(parts)[order] for parts in zip(*values, strict=True))
        else:
            fields[name] = torch.cat(values)[order]
    return type(outputs[0])(**fields)
