# SPDX-License-Identifier: Apache-2.0
"""``spf.accelerate``: a live PEFT prompt-learning model, served and trained by this package."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.model import SoftPromptModel


def accelerate(peft_model: Any, *, backend: str | None = None) -> Any:
    """The same model with each prompt computed once: same ``forward``, same ``generate``, same parameters.

    Args:
        peft_model: a PEFT model whose adapters are all prompt-learning methods (PROMPT_TUNING, P_TUNING,
            MULTITASK_PROMPT_TUNING, CPT, PREFIX_TUNING, CARTRIDGE). Its adapters become prompts of the same names,
            over the very same tensors: training either trains both. The PEFT model keeps working and keeps its
            results.
        backend: force one backend of the ops; None picks automatically.

    Returns:
        A :class:`SoftPromptModel`, or for encoders and encoder-decoders their counterpart, whose active prompt is
        the PEFT model's active adapter and whose training mode is the PEFT model's.

    Raises:
        ValueError: an adapter is no prompt-learning method (LoRA, ...); the message names it.
        TypeError: `peft_model` is no PEFT model.
    """
    if not hasattr(peft_model, "peft_config") or not hasattr(peft_model, "get_base_model"):
        raise TypeError(
            f"peft_model: expected a PEFT model, found {type(peft_model).__name__}; "
            "for a plain transformers model use SoftPromptModel(base)"
        )
    prompts = {name: peft_io.from_peft_model(peft_model, name) for name in peft_model.peft_config}
    base = peft_model.get_base_model()
    model: Any = model_class(base)(base, backend=backend, freeze_base=False)  # PEFT has frozen what it means to freeze
    for name, prompt in prompts.items():
        model.add_prompt(name, prompt)
    model.set_prompt(peft_model.active_adapter)
    return model.train(peft_model.training)


def model_class(base: PreTrainedModel) -> type[nn.Module]:
    """The class of this package that serves `base`: by what it is, not by its name."""
    if base.can_generate() and not base.config.is_encoder_decoder:
        return SoftPromptModel
    from softprompt_fast.encoder import EncoderDecoderSoftPromptModel, EncoderSoftPromptModel

    return EncoderDecoderSoftPromptModel if base.config.is_encoder_decoder else EncoderSoftPromptModel
