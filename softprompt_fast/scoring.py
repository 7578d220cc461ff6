# SPDX-License-Identifier: Apache-2.0
"""What a call with labels wants of its prompts and of the base's pass, and what it makes of their results.

A loss needs logits at labelled positions only. So where no logits were asked for, the pass ends with hidden states of
those positions and the :class:`~softprompt_fast.losses.Head` for them; where the base can't be left there, with logits
of the columns that hold a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from softprompt_fast.integrations import trainer
from softprompt_fast.losses import IGNORE, Head, Terms, causal_lm_terms, cpt_terms, split_labels, visible_labels
from softprompt_fast.packed import Packed
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.rows import check_labels


@dataclass(frozen=True)
class LabelledStates:
    """A pass that ended before its head.

    Attributes:
        hidden: ``[n, H]`` of the own tokens that predict a label. head: the one that they are for.
        output: of the base's decoder, where that ran; None behind the fused passes.
    """

    hidden: Tensor
    head: Head
    output: ModelOutput | None = None


@dataclass(frozen=True)
class LabelledCall:
    """A call with labels, before its pass.

    Attributes:
        labels: int64 ``[B, S]``, -100 at padding. own_start: int32 ``[B]`` or None for 0.
        cpt: whether the loss is CPT's, over labels of virtual tokens too.
        chunked: whether logits are made where there is a label only; ``out.logits`` is then None.
        scores: whether scores of the labelled tokens are wanted in place of a loss.
    """

    labels: Tensor
    own_start: Tensor | None
    cpt: bool
    chunked: bool
    scores: bool

    @classmethod
    def of(
        cls,
        labels: Tensor,
        own_start: Tensor | None,
        own_end: Tensor | None,
        prompts: Iterable[SoftPrompt | PrefixKV | None],
        *,
        vocab_size: int,
        chunked: bool,
        scores: bool,
    ) -> LabelledCall:
        """The call of these `labels` ``[B, S]`` with each row's prompt.

        Raises:
            ValueError: rows with CPT beside others, or scores of CPT, whose loss has further terms.
            IndexError: a label outside the vocabulary (looked for on the CPU).
        """
        labels = visible_labels(labels.long(), own_start, own_end)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, vocab_size)
        prompts = list(prompts)
        is_cpt = {getattr(prompt, "method", "") == "CPT" for prompt in prompts}
        if is_cpt == {True, False}:
            raise ValueError("prompt: a call with labels mixes CPT, which has its own loss, with other prompts")
        # A compiled CPT prompt is keys and values like any other.
        cpt = is_cpt == {True} and not any(isinstance(prompt, PrefixKV) for prompt in prompts)
        if cpt and scores:
            raise ValueError("return_token_scores: CPT has a loss of its own")
        return cls(labels, own_start, cpt, chunked or scores, scores)

    @property
    def wants_predictions(self) -> bool:
        """Whether what the prompts' last virtual tokens predict is needed."""
        if not self.chunked or torch.compiler.is_compiling():
            return True
        return bool((split_labels(self.labels, self.own_start)[1] != IGNORE).any())

    def terms(
        self,
        packed: Packed | None,
        index: Tensor | None,
        prompt_of: Callable[[str], SoftPrompt | PrefixKV],
        padding: Tensor | None,
        input_type_mask: Tensor | None,
    ) -> Terms:
        """What the loss sums; CPT's is its own (formula: ``SoftPrompt.cpt_targets``).

        Args:
            index: int32 ``[B]``, each row's prefix in `packed`, -1 for none; None: all rows have the only one.
            prompt_of: the prompt of a name.
            padding: bool ``[B, S]``, the columns that are no own tokens (for CPT); None: there are none.
            input_type_mask: int ``[B, S]``, CPT's token types; None: all labels count.
        """
        if packed is None or not self.cpt:
            predicts = () if packed is None else [logits is not None for logits in packed.next_logits]
            return causal_lm_terms(self.labels, self.own_start, index, predicts)
        groups = []
        for place, row_prompt in enumerate(packed.prompts):
            assert row_prompt is not None  # prompts that the call ran itself lie end to end
            rows = torch.arange(len(self.labels), device=self.labels.device)
            rows = rows if index is None else rows[index == place]
            prompt = prompt_of(row_prompt[0])
            assert isinstance(prompt, SoftPrompt)
            types = None if input_type_mask is None else input_type_mask[rows]
            unused = None if padding is None else padding[rows]
            groups.append((rows, *prompt.cpt_targets(self.labels[rows], types, unused)))
        return cpt_terms(self.labels, self.own_start, groups)

    def result(
        self,
        out: LabelledStates | ModelOutput,
        terms: Terms,
        columns: int | Tensor,
        packed: Packed | None,
        num_items: Tensor | int | None,
    ) -> ModelOutput:
        """What the call returns: the base's output class with a loss, or token scores.

        Args:
            out: of the pass: :class:`LabelledStates`, or an output with ``logits`` of `columns` (``Terms.sum_of``).
            num_items: divisor of the summed loss instead of the number of its terms; not for CPT.
        """
        length = self.labels.shape[1]
        if self.scores:
            return self._token_scores(out, terms, columns, packed)
        if isinstance(out, LabelledStates):
            own = out.head.sum(out.hidden, terms.labels, terms.weights)
            kept = {} if out.output is None else out.output
            fields = {name: kept.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
            out = CausalLMOutputWithPast(**fields)
        else:
            own = terms.sum_of(out.logits, columns, length)
        predictions = ((), ()) if packed is None else (packed.next_logits, packed.virtual_logits)
        loss = terms.loss(own, *predictions, None if self.cpt else num_items)
        fields = {name: value for name, value in out.items() if name not in ("loss", "logits")}
        return type(out)(loss=loss, logits=None if self.chunked else out.logits, **fields)

    def _token_scores(
        self, out: LabelledStates | ModelOutput, terms: Terms, columns: int | Tensor, packed: Packed | None
    ) -> trainer.TokenScores:
        """Scores of the labels that own tokens predict, then of those that the prefixes do."""
        groups: list[tuple[Tensor, Tensor, Head | None]]
        if isinstance(out, LabelledStates):
            groups = [(out.hidden, terms.labels, out.head)]
        else:
            groups = [(out.logits[terms.places(columns, self.labels.shape[1])], terms.labels, None)]
        for place, of_prefix in enumerate(terms.prefixes):
            predicted = None if packed is None else packed.next_logits[place]
            if predicted is not None and len(of_prefix.labels):
                groups.append((predicted.expand(len(of_prefix.labels), -1), of_prefix.labels, None))
        return trainer.token_scores(groups)
