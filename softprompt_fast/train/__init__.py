# SPDX-License-Identifier: Apache-2.0
"""What ``softprompt-fast train`` does: read a dataset, train one prompt, keep checkpoints, report.

- :mod:`.data`: rows of a file or a hub dataset as token ids with labels.
- :mod:`.start`: the prompt before its first step.
- :mod:`.run`: the run itself, on transformers' Trainer.
- :mod:`.report`: its numbers as a table, a picture and JSON.
"""
