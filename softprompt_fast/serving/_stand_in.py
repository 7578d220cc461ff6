# SPDX-License-Identifier: Apache-2.0
"""`model.bank` until it has holds: the interface on today's ``PromptBank``. Goes once the bank has its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.bank import Compiled, Packed, pack


class Held:
    def __init__(self, prompt: Any, version: int, prefix: Any) -> None:
        self.prompt, self.version, self.prefix = prompt, version, prefix
        self.length, self.next_logits = prefix.num_virtual_tokens, prefix.next_logits

    def release(self) -> None:
        pass


class StandInBank:
    def __init__(self, model: Any) -> None:
        self._bank, self._dtype, self._device = model._bank, model.dtype, model.device
        self._last: tuple[Any, Packed] | None = None

    def hold(self, name: str, task: int | None = None) -> Held:
        row = (name, self._bank.check_task(name, task))
        return Held(row, *self._bank._resolve(*row))

    def pack_held(self, rows: Sequence[Held | None]) -> tuple[Packed | None, Tensor | None]:
        distinct = {(held.prompt, held.version): held for held in rows if held is not None}
        if not distinct:
            return None, None
        key = tuple(distinct)
        if self._last is None or self._last[0] != key:
            compiled = [Compiled.of(held.prefix) for held in distinct.values()]
            with torch.inference_mode(False), torch.no_grad():
                prompts, versions = zip(*key, strict=True)
                packed = pack(prompts, versions, compiled, self._dtype)
            self._last = key, packed
        place = {name: i for i, name in enumerate(key)}
        index = [-1 if held is None else place[held.prompt, held.version] for held in rows]
        return self._last[1], torch.tensor(index, dtype=torch.int32, device=self._device)

    @property
    def names(self) -> list[str]:
        return self._bank.names

    def __contains__(self, name: str) -> bool:
        return name in self._bank

    def metrics(self) -> dict[str, int | float]:
        return {"prompts": len(self._bank)}
