# SPDX-License-Identifier: Apache-2.0
"""The one torch.library handle of the package: every op lives under ``torch.ops.softprompt_fast``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# FRAGMENT: the C++ extension may define further ops in the same namespace.
LIBRARY = torch.library.Library("softprompt_fast", "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op below autograd and return its overload.

    ``Library.define`` and ``impl``, not ``torch.library.custom_op``: 9 us a call with autograd instead of 11, 5 us
    without (17 arguments, on a CPU), and a decode step calls prefix_attention once a layer.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"softprompt_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.softprompt_fast, name).default


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an op its gradient formula."""
    torch.library.register_autograd(f"softprompt_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def call(op: Any, *args: Any) -> Any:
    """Call an op; where no gradient can be wanted, without the 5 us detour through its Python autograd kernel."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would reach into an implementation and round its float32 intermediates to 16 bits."""

    def run(*args: Any) -> Any:
        # Optional gradients may come first and be None.
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return implementation(*args)
        with torch.autocast(device, enabled=False):
            return implementation(*args)

    return run
