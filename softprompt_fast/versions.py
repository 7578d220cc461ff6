# SPDX-License-Identifier: Apache-2.0
"""Numbers by which content is known to have changed."""

from __future__ import annotations

import itertools

from torch.optim.optimizer import register_optimizer_step_post_hook

#: Versions are unique in the process, not in a bank: a cache may be handed to another model that knows the same names.
VERSIONS = itertools.count(1)
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    # Fused optimizers write parameters without autograd's version counters noticing.
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def optimizer_steps() -> int:
    """Steps that ``torch.optim`` optimizers made in this process."""
    return _optimizer_steps
