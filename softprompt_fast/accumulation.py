# SPDX-License-Identifier: Apache-2.0
"""A prompt run once for all micro-batches of an optimizer step.

The gradient of a sum of losses is linear in the gradients of the prompt's keys and values: those of every micro-batch
can be summed first and taken through the prompt's own layers together. So the micro-batches see detached copies
(leaves) of one run's keys, values and logits, where autograd sums their gradients, and the prompt's backward runs
once: inside the last micro-batch's own ``backward()`` where it is known to be the last (gradient clipping, loss
scaling and DistributedDataParallel's hooks then see whole gradients), else when told to.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from softprompt_fast.packed import Compiled, RowPrompt

logger = logging.getLogger("softprompt_fast")

#: What a gradient holds while all of it is parked: a zero that scaling (clipping) keeps, and ``zero_()`` doesn't.
_UNTOUCHED = -0.0


def _mapped(compiled: Compiled, change: Callable[[Tensor], Tensor]) -> Compiled:
    def optional(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return replace(
        compiled,
        keys=tuple(map(change, compiled.keys)),
        values=tuple(map(change, compiled.values)),
        next_logits=optional(compiled.next_logits),
        virtual_logits=optional(compiled.virtual_logits),
    )


class _SharedRun:
    """What the micro-batches of one optimizer step share: prompts run once, and the gradients parked on their leaves.

    Attributes:
        versions: of each prompt in it; another one means that the prompt has changed since.
        parked: whether a micro-batch's backward has left gradients here that are not on the parameters yet.
        ended: whether the prompts' own backward has run.
    """

    def __init__(self) -> None:
        self.versions: dict[RowPrompt, int] = {}
        self.parked = self.ended = False
        self._compiled: dict[Hashable, Compiled] = {}
        self._roots: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._parameters: dict[nn.Parameter, None] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor, int]] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self._compiled

    def add(self, key: Hashable, compiled: Compiled, parameters: Iterable[nn.Parameter]) -> None:
        self._compiled[key] = compiled
        self._parameters.update(dict.fromkeys(p for p in parameters if p.requires_grad))
        _mapped(compiled, self._add_leaf)

    def _add_leaf(self, root: Tensor) -> Tensor:
        if root.requires_grad:
            leaf = root.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(_receiver(self))
            self._roots.append(root)
            self._leaves.append(leaf)
        return root

    def receive(self) -> None:
        """A micro-batch's backward has reached a leaf."""
        if not self.parked:
            self.parked = True
            for parameter in self._parameters:
                # As after a backward pass. It also shows a zero_grad(), which has to reach what is parked here too.
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter).fill_(_UNTOUCHED)
                elif not parameter.grad.any():
                    parameter.grad.fill_(_UNTOUCHED)
                self._gradients.append((parameter, parameter.grad, parameter.grad._version))

    def was_zeroed(self) -> bool:
        """Whether somebody has cleared the parameters' gradients since a micro-batch's were parked."""

        def zeroed(parameter: nn.Parameter, gradient: Tensor, version: int) -> bool:
            now = parameter.grad
            if now is None:
                return True
            return (now is not gradient or now._version != version) and not bool(now.any() | now.signbit().any())

        return self.parked and all(zeroed(*known) for known in self._gradients)

    def trains(self, parameters: Iterable[nn.Parameter]) -> bool:
        return any(parameter in self._parameters for parameter in parameters)

    def detached(self, keys: Sequence[Hashable]) -> list[Compiled]:
        """Prompts for a micro-batch that others follow: their gradients stay here."""
        return self._with(keys, self._leaves)

    def connected(self, keys: Sequence[Hashable]) -> list[Compiled]:
        """Prompts for the last micro-batch: its backward takes all that is parked along."""
        return self._with(keys, _AddParked.apply(self, *self._roots))

    def _with(self, keys: Sequence[Hashable], tensors: Sequence[Tensor]) -> list[Compiled]:
        instead = {id(root): tensor for root, tensor in zip(self._roots, tensors, strict=True)}
        return [_mapped(self._compiled[key], lambda root: instead.get(id(root), root)) for key in keys]

    def take(self) -> list[Tensor | None]:
        """The parked gradients, one per root; they are handed out once, and nothing is kept."""
        gradients = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        self.ended, self.parked = True, False
        self._compiled, self._roots, self._leaves = {}, [], []
        return gradients

    def backward(self) -> None:
        """Run the prompts' backward now: parked gradients are added to the parameters' ``grad``."""
        roots = self._roots
        pairs = [(root, grad) for root, grad in zip(roots, self.take(), strict=True) if grad is not None]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])


def _receiver(run: _SharedRun) -> Callable[[Tensor], None]:
    # Weakly: a leaf that held its run would keep both, and the prompt's graph, until the garbage collector comes.
    alive = weakref.ref(run)

    def receive(_: Tensor) -> None:
        run = alive()
        if run is None or run.ended:
            raise RuntimeError(
                "loss: the prompt's backward for this step has run already, or was dropped; call backward() on each "
                "micro-batch's loss before the next forward pass, inside accumulate_gradients() where that is used"
            )
        run.receive()

    return receive


class _AddParked(torch.autograd.Function):
    """Identity; its backward adds what earlier micro-batches have parked."""

    @staticmethod
    def forward(ctx: Any, run: _SharedRun, *roots: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(root.view_as(root) for root in roots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        def total(parked: Tensor | None, gradient: Tensor | None) -> Tensor | None:
            return gradient if parked is None else parked if gradient is None else parked + gradient

        # A second pass over a retained graph finds nothing parked.
        parked = ctx.run.take() or [None] * len(gradients)
        return None, *(total(*pair) for pair in zip(parked, gradients, strict=True))


@dataclass(eq=False)
class GradientAccumulation:
    """Which micro-batches of a model share one run of their prompts.

    Args:
        more_follow: says during a training call whether the loop has announced more micro-batches for this step.
    """

    more_follow: Callable[[], bool]
    #: Inside :meth:`window`.
    explicit: bool = field(default=False, init=False)
    _open: _SharedRun | None = field(default=None, init=False)
    #: Handed to a loss whose backward has not run yet.
    _pending: list[_SharedRun] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        _LIVE.add(self)

    @contextmanager
    def window(self) -> Iterator[None]:
        """All training calls inside share their prompts' runs; the prompts' backward runs at the end."""
        if self.explicit:
            yield
            return
        self.explicit = True
        try:
            yield
            self.explicit = False
            self._finish()
        finally:
            self.explicit, self._open = False, None

    def compiled(
        self,
        prompts: Mapping[RowPrompt, int],
        options: Hashable,
        compile_prompts: Callable[[list[RowPrompt]], list[Compiled]],
        parameters: Callable[[RowPrompt], Iterable[nn.Parameter]],
        *,
        training: bool,
    ) -> list[Compiled]:
        """Prompts with their graph: from the shared run of this step where there is one or should be one.

        Args:
            prompts: the version of each prompt that is wanted.
            options: whatever else decides what `compile_prompts` returns.
            compile_prompts: runs the base over prompts, keeping the graph.
            parameters: a prompt's own.
            training: whether the call is one whose announced micro-batches count.
        """
        self._forget_zeroed()
        rows = list(prompts)
        follows = self.explicit or (training and self.more_follow())
        if not (follows or (training and self._open is not None)):
            return compile_prompts(rows)
        run = self._current(prompts)
        if run is None and not follows:
            return compile_prompts(rows)
        if run is None:
            run = self._open = _SharedRun()
        missing = [row for row in rows if (row, options) not in run]
        for row, compiled in zip(missing, compile_prompts(missing) if missing else (), strict=True):
            run.add((row, options), compiled, parameters(row))
            run.versions[row] = prompts[row]
        keys = [(row, options) for row in rows]
        if follows:
            return run.detached(keys)
        # A second call before this one's backward has to run its prompts anew: a graph is differentiated once.
        self._open = None
        self._pending.append(run)
        return run.connected(keys)

    def _current(self, prompts: Mapping[RowPrompt, int]) -> _SharedRun | None:
        """The open run, if it still holds for `prompts`."""
        run = self._open
        if run is not None and any(run.versions.get(row, version) != version for row, version in prompts.items()):
            self._finish()
            run = None
        return run

    def _forget_zeroed(self) -> None:
        """Drop what a ``zero_grad()`` was for, before new gradients hide that there was one."""
        if self._open is not None and self._open.was_zeroed():
            self._open = None
        self._pending = [run for run in self._pending if run.parked and not run.was_zeroed()]

    def _finish(self) -> None:
        run, self._open = self._open, None
        if run is not None and run.parked and not run.was_zeroed():
            run.backward()

    def before_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Whatever is still parked for `parameters` goes to their gradients now."""
        for run in [*self._pending, *([] if self._open is None else [self._open])]:
            if not run.trains(parameters):
                continue
            if run is self._open:
                self._open = None  # what it computed holds no longer
            if run.parked and not run.was_zeroed():
                logger.warning(
                    "gradient accumulation: an optimizer steps before the last micro-batch that was announced; the "
                    "gradients of the earlier ones are added now, after any clipping"
                )
                run.backward()
        self._pending = [run for run in self._pending if run.parked]


_LIVE: weakref.WeakSet[GradientAccumulation] = weakref.WeakSet()


def _before_step(optimizer: Optimizer, *_: object) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for accumulation in tuple(_LIVE):
        accumulation.before_step(parameters)


register_optimizer_step_pre_hook(_before_step)
