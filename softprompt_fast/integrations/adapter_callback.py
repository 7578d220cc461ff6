# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT loads, in every checkpoint of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class SaveAdapter(TrainerCallback):
    """Puts the active prompt beside the state dict that Trainer writes for resuming, as a PEFT adapter:
    ``checkpoint-N/adapter_config.json`` and ``adapter_model.safetensors``."""

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            model.save_pretrained(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
