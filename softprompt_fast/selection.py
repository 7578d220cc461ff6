# SPDX-License-Identifier: Apache-2.0
"""What a call attends to: prefixes from the bank where they are frozen, run in the call where they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_fast.accumulation import GradientAccumulation
from softprompt_fast.bank import Held, PromptBank
from softprompt_fast.compiling import PromptCompiler
from softprompt_fast.explanation import serving_backend
from softprompt_fast.integrations import trainer
from softprompt_fast.packed import Compiled, Packed, RowPrompt
from softprompt_fast.prefix_kv import PrefixKV


@dataclass(frozen=True)
class Selection:
    """What a call attends to, until it is released.

    Attributes:
        packed: the prefixes; None: no row has one.
        index: int32 ``[B]``, each row's place in `packed`, -1 for none; None: all rows use the only one.
        held: what must stay in the bank until then.
    """

    packed: Packed | None = None
    index: Tensor | None = None
    held: tuple[Held | None, ...] = ()

    def release(self) -> None:
        for held in self.held:
            if held is not None:
                held.release()


class PromptSelector:
    """Selects the prefixes of calls to one base.

    Args:
        bank: its prompts. compiler: runs it over them. accumulation: which calls share such a run.
        backend: the one of the ops that is asked for by name; None picks automatically.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        bank: PromptBank,
        compiler: PromptCompiler,
        accumulation: GradientAccumulation,
        backend: str | None,
    ) -> None:
        self._base, self._bank, self._compiler = base, bank, compiler
        self._accumulation, self._backend = accumulation, backend

    def select(
        self,
        rows: Sequence[RowPrompt | None] | Packed,
        *,
        training: bool = False,
        labels: bool = False,
        sharded: bool = False,
        virtual_logits: bool = False,
        next_logits: bool = True,
        output_attentions: bool | None = False,
    ) -> Selection:
        """The prefixes of this batch; to be released when the call is done.

        Args:
            rows: each row's prompt, its task checked; or prefixes that were selected before.
            training: whether the model is in training mode. labels: whether the call has labels.
            sharded: whether FSDP shards the prompts themselves.
            virtual_logits, next_logits: whether those are wanted of prefixes that are computed in this call.
            output_attentions: whether weights over all packed entries are.
        """
        if isinstance(rows, Packed) and not rows.is_sparse:
            return Selection(rows)
        in_place = not output_attentions and self._reads_places()
        if isinstance(rows, Packed):
            return Selection(rows if in_place else rows.dense(self._base.dtype))
        distinct = list(dict.fromkeys(row for row in rows if row is not None))
        if not distinct:
            return Selection()
        names = {name for name, _ in distinct}
        trainable = {name for name in names if torch.is_grad_enabled() and self._is_trainable(name)}
        if training and labels and trainable and trainable != names:
            raise ValueError(
                f"prompt: a training call mixes trainable prompts {sorted(trainable)} with frozen ones "
                f"{sorted(names - trainable)}; train them in separate calls, or load all with trainable=True"
            )
        if trainable or virtual_logits:
            compiled = self._compile_once_a_step(
                distinct, virtual_logits, next_logits, training=training, sharded=sharded
            )
            packed = self._bank.pack(distinct, compiled, self._base.dtype)
        elif in_place:
            return self._hold_rows(rows, indexed=len(distinct) > 1 or None in rows)
        else:
            packed = self._bank.packed(distinct, self._base.dtype)
        if len(distinct) == 1 and None not in rows:
            return Selection(packed)
        place: dict[RowPrompt | None, int] = {row: i for i, row in enumerate(distinct)}
        place[None] = -1
        index = torch.tensor([place[row] for row in rows], dtype=torch.int32, device=self._base.device)
        return Selection(packed, index)

    def _is_trainable(self, name: str) -> bool:
        """Whether the prefix of `name` has a gradient to give: to the prompt, or to a base that is trained as well."""
        base_trains = any(p.requires_grad for p in self._base.parameters())
        if self._bank.is_registered(name) and not base_trains:
            return False
        prompt = self._bank[name]
        if isinstance(prompt, PrefixKV):
            return False
        return prompt.trainable or (prompt.kind == "embedding" and base_trains)

    def _hold_rows(self, rows: Sequence[RowPrompt | None], *, indexed: bool) -> Selection:
        held = tuple(self._bank.hold_all(rows))
        try:
            packed, index = self._bank.pack_held(held)
        except BaseException:
            Selection(held=held).release()
            raise
        return Selection(packed, index if indexed else None, held)

    def _reads_places(self) -> bool:
        """Whether a call now attends to prefixes where they lie in the bank's storage: where it makes no graph, which
        would keep them, and is served by kernels that neither touch nor convert the entries between."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self._base.training:
            return False
        device = self._base.device.type
        if torch.is_autocast_enabled(device):
            return False
        serving, _ = serving_backend("prefix_attention", device, self._backend)
        if self._bank.options.dtype is not None:
            return serving in ("triton", "cuda") or (
                serving == "cpu" and self._bank.options.dtype == torch.int8 and self._base.dtype != torch.float64
            )
        return serving in ("cpu", "triton", "cuda") or (serving == "torch" and device == "cpu")

    def _compile_once_a_step(
        self, distinct: list[RowPrompt], virtual_logits: bool, next_logits: bool, *, training: bool, sharded: bool
    ) -> list[Compiled]:
        def run(rows: list[RowPrompt]) -> list[Compiled]:
            return self._compile_rows(rows, virtual_logits, next_logits)

        # FSDP around the prompts themselves has to reduce their gradients at every backward.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or sharded:
            return run(distinct)
        if self._accumulation.explicit and trainer.active_ddp() is not None:
            raise RuntimeError(
                "accumulate_gradients: its gradients would not be reduced by DistributedDataParallel; leave it out "
                "and use the wrapper's no_sync(), which this model follows"
            )
        device = self._base.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._accumulation.compiled(
            {row: self._bank.version(row[0]) for row in distinct},
            (virtual_logits, next_logits, autocast),
            run,
            self._trained_by,
            training=training,
        )

    def _trained_by(self, row: RowPrompt) -> list[nn.Parameter]:
        """What a gradient of a prompt's keys and values may reach: its own parameters, and the base's."""
        prompt = self._bank[row[0]]
        if isinstance(prompt, PrefixKV):
            return []
        return [*prompt.parameters(), *(self._base.parameters() if prompt.kind == "embedding" else ())]

    def _compile_rows(self, rows: list[RowPrompt], virtual_logits: bool, next_logits: bool) -> list[Compiled]:
        compiled: dict[RowPrompt, Compiled] = {}
        for name in dict.fromkeys(name for name, _ in rows):
            prompt = self._bank[name]
            if isinstance(prompt, PrefixKV):
                compiled[name, None] = Compiled.of(prompt.to(self._base.device, self._base.dtype))
                continue
            wanted = [row for row in rows if row[0] == name]
            tasks = None if wanted[0][1] is None else [task for _, task in wanted if task is not None]
            wants_logits = virtual_logits and prompt.method == "CPT"
            computed = self._compiler.run(prompt, tasks, all_logits=wants_logits, next_logits=next_logits)
            compiled.update(zip(wanted, computed, strict=True))
        return [compiled[row] for row in rows]

    def virtual_embeddings(self, row: RowPrompt) -> Tensor | None:
        """Virtual token embeddings ``[P, H]`` of an embedding method; None where there are none."""
        prompt = self._bank[row[0]]
        if isinstance(prompt, PrefixKV) or prompt.kind == "prefix":
            return None
        task_ids = None if row[1] is None else torch.tensor([row[1]], device=self._base.device)
        return prompt.embeddings(task_ids=task_ids).to(self._base.dtype).flatten(0, -2)
