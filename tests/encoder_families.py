# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoders and encoder-decoders, PEFT adapters for them, and padded batches of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from tests.device import randint, seeded

VOCAB = 67
VIRTUAL = 3
PAD = 1

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_ROWS = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": 3}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> Any:
    return transformers.BertConfig(**_SIZES, **_ROWS, **_QUIET, max_position_embeddings=24)


def roberta() -> Any:
    return transformers.RobertaConfig(**_SIZES, **_ROWS, **_QUIET, max_position_embeddings=24)


def llama() -> Any:
    return transformers.LlamaConfig(**_SIZES, **_ROWS, num_key_value_heads=2, max_position_embeddings=24)


def gpt2() -> Any:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(**_ROWS, **quiet, n_embd=32, n_layer=2, n_head=4, n_positions=24)


def t5() -> Any:
    # Few buckets and a short range, so that the relative bias differs between prefix entries.
    return transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=PAD,
        eos_token_id=2,
    )


def bart() -> Any:
    return transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=24,
        scale_embedding=True,
        dropout=0.0,
        decoder_start_token_id=2,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        forced_eos_token_id=None,
    )


@dataclass(frozen=True)
class Family:
    """One model class with the PEFT task it serves."""

    model: type[transformers.PreTrainedModel]
    config: Callable[[], Any]
    task: str

    @property
    def name(self) -> str:
        return self.model.__name__

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = self.config()
        if self.task == "QUESTION_ANS":
            config.num_labels = 2  # a start and an end logit
        base = self.model(config).eval()
        for parameter in base.parameters():
            # Larger than the default initialisation, so that a wrong mask or position changes results visibly.
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.12)
        return base


ENCODERS = [
    Family(transformers.BertForSequenceClassification, bert, "SEQ_CLS"),
    Family(transformers.BertForTokenClassification, bert, "TOKEN_CLS"),
    Family(transformers.BertForQuestionAnswering, bert, "QUESTION_ANS"),
    Family(transformers.BertModel, bert, "FEATURE_EXTRACTION"),
    Family(transformers.RobertaForSequenceClassification, roberta, "SEQ_CLS"),
    Family(transformers.RobertaForTokenClassification, roberta, "TOKEN_CLS"),
    Family(transformers.RobertaForQuestionAnswering, roberta, "QUESTION_ANS"),
    Family(transformers.RobertaModel, roberta, "FEATURE_EXTRACTION"),
    Family(transformers.LlamaForSequenceClassification, llama, "SEQ_CLS"),
    Family(transformers.LlamaForTokenClassification, llama, "TOKEN_CLS"),
    Family(transformers.LlamaForQuestionAnswering, llama, "QUESTION_ANS"),
    Family(transformers.LlamaModel, llama, "FEATURE_EXTRACTION"),
    Family(transformers.GPT2ForSequenceClassification, gpt2, "SEQ_CLS"),
    Family(transformers.GPT2ForTokenClassification, gpt2, "TOKEN_CLS"),
    Family(transformers.GPT2Model, gpt2, "FEATURE_EXTRACTION"),
]
ENCODER_DECODERS = [
    Family(transformers.T5ForConditionalGeneration, t5, "SEQ_2_SEQ_LM"),
    Family(transformers.BartForConditionalGeneration, bart, "SEQ_2_SEQ_LM"),
]

#: PEFT's configuration of every method that it has outside causal LMs (CPT refuses every other task type).
METHODS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "PROMPT_TUNING": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL),
    "P_TUNING": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "MULTITASK_PROMPT_TUNING": lambda task: peft.MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, num_tasks=3
    ),
    "PREFIX_TUNING": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL),
    "PREFIX_TUNING-projected": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
    "CARTRIDGE": lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=VIRTUAL),
}


def with_adapter(base: transformers.PreTrainedModel, family: Family, method: str, seed: int = 1) -> peft.PeftModel:
    """A live PEFT model with a prompt (and head) of random values, large enough to matter."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, METHODS[method](family.task)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # P_TUNING and projections end in a linear layer of small initial weights.
                parameter.normal_(0.0, 0.3 if "_head" in name or "transform" in name else 0.7)
    return model


def ragged_rows(batch: int, longest: int = 7, seed: int = 2) -> list[Tensor]:
    """`batch` rows of different lengths, longest first, that hold neither the pad nor the end token."""
    generator = seeded(seed)
    return [randint(5, VOCAB, (longest - 2 * i,), generator=generator) for i in range(batch)]


def stack(rows: list[Tensor], side: str, fill: int = PAD) -> tuple[Tensor, Tensor | None]:
    """Rows padded on `side` ("left", "right"; "none": all cut to the shortest), with their mask (None for "none")."""
    if side == "none":
        shortest = min(map(len, rows))
        return torch.stack([row[:shortest] for row in rows]), None
    width = max(map(len, rows)) + (len(rows) == 1)  # a batch of one is padded too; in others the longest row is not
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def layouts() -> list[tuple[int, str]]:
    """Every batch size and padding side that a test loops over."""
    return [(batch, side) for batch in (1, 3) for side in ("none", "right", "left")]


def columns(mask: Tensor | None, row: int, width: int) -> slice:
    """The columns of a row's own tokens."""
    if mask is None:
        return slice(0, width)
    first = int(mask[row].argmax())
    return slice(first, first + int(mask[row].sum()))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a PEFT model trains: its prompt's, and its head's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), found, strict=True)
    }


def assert_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal to 1e-4, relative to the largest entry of each tensor; and some prompt gradient is not zero."""
    assert any(grad.abs().max() > 0 for name, grad in theirs.items() if "prompt_encoder" in name)
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        error = float((ours[name] - expected).abs().max())
        if scale <= 1e-6 * largest:
            # Zero but for rounding, like the bias of a span head, which shifts all logits alike.
            assert error <= 1e-6 * largest, f"{name}: expected no gradient, found {error:.2e}"
        else:
            assert error <= 1e-4 * scale, f"{name}: gradient differs by {error / scale:.2e} of its scale"
