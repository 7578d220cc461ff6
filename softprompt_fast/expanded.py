# SPDX-License-Identifier: Apache-2.0
"""The exact fallback: families whose attention the prefix can't reach get it expanded into an ordinary cache.

Such a family (ALiBi code of its own, dropped keyword arguments, ...) may also place positions by column. So rows run
in groups that share a prompt, moved to the left edge: behind their prefix, own tokens start at the next column, and
what stands to the right of a row's last token is invisible to it in any causal model. Generation also groups rows by
length, because its next token takes the next column.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from softprompt_fast.cache import OwnTokenCache
from softprompt_fast.packed import Packed

_MOST_RESERVED = 1024


def run_prompt(
    base: PreTrainedModel, embeds: Tensor, logits_to_keep: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and values per layer ``[N, Hkv, P, D]`` and logits of ``[N, P, H]`` prompt embeddings."""
    cache = DynamicCache()  # without a config: its sliding layers would drop the first virtual tokens
    logits = base(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep).logits
    if len(cache.layers) == 0 or cache.get_seq_length() != embeds.shape[1]:
        raise ValueError(
            f"{type(base).__name__} did not fill its cache (gradient checkpointing is on, or it keeps no keys and "
            "values), so its prompts can't be computed once: call gradient_checkpointing_disable() on the base"
        )
    if kinds := {type(layer).__name__ for layer in cache.layers if getattr(layer, "keys", None) is None}:
        raise ValueError(f"{type(base).__name__} has layers without keys and values ({', '.join(sorted(kinds))})")
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], logits


def forward(
    base: PreTrainedModel,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    packed: Packed | None,
    index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    cache: Cache | None,
    use_cache: bool,
    logits_to_keep: int | Tensor,
    decoder: nn.Module | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """One pass, row groups one after another; logits come back at their own columns. With a `decoder`, a part of
    `base`, that runs alone: its ``last_hidden_state`` comes back so.

    Args:
        position_ids: int64 ``[1 or B, S]``, positions among own tokens; None: counted from each row's first.

    Raises:
        ValueError: options that only one unpadded group can serve (a cache handed in, hidden states); positions that
            don't count up from a row's first token, of a base that takes none.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    batch, length = given.shape[:2]
    start = torch.zeros(batch, dtype=torch.long, device="cpu") if own_start is None else own_start.long().cpu()
    end = torch.full((batch,), length, device="cpu") if own_end is None else own_end.long().cpu()
    run, field = (base, "logits") if decoder is None else (decoder, "last_hidden_state")
    groups = _groups(packed, index, batch)
    whole = len(groups) == 1 and own_start is None and own_end is None
    name = "input_ids" if input_ids is not None else "inputs_embeds"
    if not whole and (cache is not None or kwargs.get("output_hidden_states") or kwargs.get("output_attentions")):
        raise ValueError(
            f"{type(base).__name__} takes the expanded path, which serves past_key_values, output_hidden_states and "
            "output_attentions only for unpadded rows of one prompt"
        )
    if whole:
        place, rows = next(iter(groups.items()))
        if cache is None or cache.get_seq_length() == 0:
            cache = expanded_cache(packed, place, batch, base.dtype, cache)
        past = cache.get_seq_length()
        mask = torch.ones(batch, past + length, dtype=torch.long, device=given.device)
        if decoder is None:
            kwargs["logits_to_keep"] = logits_to_keep
        if position_ids is not None:
            kwargs |= _positions(
                base, position_ids.cpu(), _length(packed, place), torch.arange(length, device="cpu") + past
            )
        return run(
            **{name: given},
            attention_mask=mask,
            past_key_values=cache if past or use_cache else None,
            use_cache=use_cache or past > 0,
            **kwargs,
        )

    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, rows in groups.items():
        widths = (end[rows] - start[rows]).clamp(min=0)
        longest = max(int(widths.max()), 1)
        column = torch.arange(longest, device="cpu")
        source = (start[rows][:, None] + column).clamp(max=length - 1)
        real = column < widths[:, None]
        tokens = given[rows[:, None].to(given.device), source.to(given.device)]
        prefix = expanded_cache(packed, place, len(rows), base.dtype)
        past = prefix.get_seq_length()
        mask = pad(real.long(), (past, 0), value=1).to(given.device)
        placed: dict[str, Tensor] = {}
        if position_ids is not None:
            asked = position_ids.cpu().expand(batch, -1)[rows[:, None], source]
            # What stands behind a row's last token is seen by nobody: its column does for a position.
            asked = torch.where(real, asked, column)
            placed = _positions(base, asked, past, column + past)
        out = run(
            **{name: tokens},
            attention_mask=mask,
            past_key_values=prefix if past else None,
            use_cache=past > 0,
            **placed,
            **kwargs,
        )
        pieces.append((rows[:, None].expand_as(source)[real], source[real], out[field][real.to(given.device)]))
    found = given.new_zeros(batch, length, pieces[0][2].shape[-1], dtype=pieces[0][2].dtype)
    at = torch.cat([p[0] for p in pieces]).to(given.device), torch.cat([p[1] for p in pieces]).to(given.device)
    found = found.index_put(at, torch.cat([p[2] for p in pieces]))
    if isinstance(logits_to_keep, Tensor):
        found = found[:, logits_to_keep]
    elif logits_to_keep:
        found = found[:, -logits_to_keep:]
    return type(out)(**{field: found})


def generate(
    base: PreTrainedModel,
    *,
    input_ids: Tensor | None,
    packed: Packed | None,
    index: Tensor | None,
    attention_mask: Tensor | None,
    prompt_embeddings: Callable[[Any], Tensor | None],
    **kwargs: Any,
) -> Any:
    """transformers' ``generate`` on each group of rows with one prompt and one length, unpadded.

    Args:
        prompt_embeddings: virtual token embeddings ``[P, H]`` of a prompt (None for a prefix method), from which
            rows without an own token start.
    """
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError(f"inputs_embeds: {type(base).__name__} takes the expanded path, which needs input_ids")
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            f"past_key_values: {type(base).__name__} takes the expanded path, which can't continue a cache; "
            "pass the whole text"
        )
    batch, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    config = copy.deepcopy(kwargs.pop("generation_config", None) or base.generation_config)
    leftover = config.update(**kwargs)
    if config.max_new_tokens is None:
        config.max_new_tokens = max(1, (config.max_length or length + 20) - length)
    config.max_length = None
    # The prefix already sits in a dynamic cache. These would only change speed and memory, not results, and not every
    # transformers gets the last two right behind a cache that already holds tokens.
    config.cache_implementation = None
    config.prefill_chunk_size = None
    config.prompt_lookup_num_tokens = None
    config.use_cache = True
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    returned = config.num_return_sequences or 1

    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    lengths = (mask != 0).sum(dim=1).tolist()
    for place, rows in _groups(packed, index, batch).items():
        for row in rows.tolist():
            groups[place, lengths[row]].append(row)
    if len(groups) > 1 and (config.return_dict_in_generate or leftover.get("streamer") is not None):
        raise ValueError(
            f"{type(base).__name__} takes the expanded path, where return_dict_in_generate and streamer need rows of "
            "one prompt and one length"
        )

    new_tokens: list[Tensor | None] = [None] * (batch * returned)
    for (place, own), members in groups.items():
        rows = torch.tensor(members, device=input_ids.device)
        ids = input_ids[rows][mask[rows] != 0].view(len(members), own)
        virtual = _length(packed, place)
        if own == 0:
            embeds = None if packed is None or place < 0 else prompt_embeddings(packed.prompts[place])
            if embeds is None:
                raise ValueError(
                    f"input_ids: row {members[0]} has no own token and no virtual token predicts one; "
                    "give it at least one, e.g. the BOS token"
                )
            embeds = embeds.repeat(len(members), 1, 1)
            given = {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2], dtype=torch.long)}
        else:
            given = {"input_ids": ids, "attention_mask": ids.new_ones(len(members), virtual + own)}
            if packed is not None and virtual:
                more = own + min(config.max_new_tokens, _MOST_RESERVED)
                room = OwnTokenCache(len(packed.keys), reserve=virtual + more)
                rows_held = len(members) * copies
                given["past_key_values"] = expanded_cache(packed, place, rows_held, base.dtype, room)
        result = base.generate(**given, generation_config=config, **leftover)
        sequences = result if isinstance(result, Tensor) else result.sequences
        if not isinstance(result, Tensor):
            result["sequences"] = sequences = torch.cat(
                [input_ids.repeat_interleave(returned, 0), sequences[:, own:]], 1
            )
            return result
        for i, row in enumerate(members):
            for r in range(returned):
                new_tokens[row * returned + r] = sequences[i * returned + r, own:]

    fill = config.pad_token_id if config.pad_token_id is not None else base.generation_config.pad_token_id
    if fill is None:
        eos = config.eos_token_id
        fill = eos[0] if isinstance(eos, list) else eos if eos is not None else 0
    found = [tokens for tokens in new_tokens if tokens is not None]
    width = max(len(tokens) for tokens in found)
    out = input_ids.new_full((batch * returned, width), fill)
    for row, tokens in enumerate(found):
        out[row, : len(tokens)] = tokens
    return torch.cat([input_ids.repeat_interleave(returned, dim=0), out], dim=1)


def expanded_cache(
    packed: Packed | None, place: int, rows: int, dtype: torch.dtype, cache: Cache | None = None
) -> Cache:
    """A transformers cache (`cache`, which is empty, or a new one) that holds prefix `place` for each of `rows` rows
    (nothing for -1), in `dtype` if the prefix is 8-bit."""
    cache = DynamicCache() if cache is None else cache
    if packed is not None and place >= 0:
        for layer, (key, value) in enumerate(packed.floating(place, dtype)):
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def _length(packed: Packed | None, place: int) -> int:
    return 0 if packed is None or place < 0 else packed.lengths[place]


def _positions(base: PreTrainedModel, asked: Tensor, virtual: int, columns: Tensor) -> dict[str, Tensor]:
    """The argument that has `base` place own tokens at `asked` ``[rows, S]``, behind `virtual` tokens; none where that
    is their place in the cache (`columns` ``[S]``), which every base knows.

    Raises:
        ValueError: it is another place, and `base` takes no positions.
    """
    positions = asked + virtual
    if bool((positions == columns).all()):
        return {}
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(f"position_ids: {type(base).__name__} counts positions itself, from a row's first token on")
    return {"position_ids": positions.to(base.device)}


def _groups(packed: Packed | None, index: Tensor | None, batch: int) -> dict[int, Tensor]:
    """Row numbers by the prefix they use, -1 for none."""
    if packed is None:
        return {-1: torch.arange(batch, device="cpu")}
    if index is None:
        return {0: torch.arange(batch, device="cpu")}
    places = index.cpu()
    return {int(place): (places == place).nonzero()[:, 0] for place in places.unique()}
