# SPDX-License-Identifier: Apache-2.0
"""What ``softprompt-fast train`` does: read a dataset, train one prompt, keep checkpoints, report.

- :mod:`.data`: rows of a file or a hub dataset as token ids with labels.
- :mod:`.start`: the prompt before its first step.
- :mod:`.run`: the run itself, on transformers' Trainer.
- :mod:`.report`: its numbers as a table, a picture and JSON.
"""

from __future__ import annotations

import importlib


def check_packages(tensorboard: bool) -> None:
    """Import what a run needs beyond the package's own dependencies, so that it fails at once or not for that.

    Raises:
        ModuleNotFoundError: one of the extra ``train`` is missing; names it.
    """
    for name in ("accelerate", "matplotlib", *(["tensorboard"] if tensorboard else [])):
        importlib.import_module(name)
