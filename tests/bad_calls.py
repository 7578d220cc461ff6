# SPDX-License-Identifier: Apache-2.0
"""Random bad calls of the ops and of the C++ ops below them, in a process that tests watch from outside.

    python tests/bad_calls.py COUNT SEED

A call of an op with arguments changed at random raises an exception that says what was expected and found, or returns
what the reference returns for them. A call of a C++ op with arguments changed at random raises, says that it is
refused, or returns. Prints how many calls ended in which way; the exit status is 1 if one ended otherwise. A crash
would end the process.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import _registry
from softprompt_fast.testing import attention_inputs, poisoned_memory

Call = tuple[Callable[..., Any], dict[str, Any]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
#: The exceptions that the checks of the ops raise; their text must say what was expected and found.
CHECKED = (ValueError, IndexError, RuntimeError)


# ---- good calls -----------------------------------------------------------------------------------------------------


def prefix_attention(draw: random.Random) -> Call:
    batch, kv_heads, groups, queries = (draw.randint(1, 3) for _ in range(4))
    own, prefix = queries + draw.randint(0, 4), draw.randint(0, 5)
    options: dict[str, Any] = {"scale": 0.3, "causal": True}
    if draw.random() < 0.5:
        options |= {"prefix_offsets": [0, prefix // 2, prefix]}
        options |= {"prefix_index": [draw.randint(-1, 1) for _ in range(batch)]}
    if draw.random() < 0.5:
        options |= {"own_start": [draw.randint(0, 1) for _ in range(batch)], "own_end": [own] * batch}
        options |= {"query_start": [own - queries] * batch}
    if draw.random() < 0.3:
        options |= {"sliding_window": draw.randint(1, 9)}
    if draw.random() < 0.3:
        options |= {"softcap": 2.0}
    if draw.random() < 0.3:
        options |= {"sinks": True}
    if draw.random() < 0.3:
        options |= {"bias": (batch, 1, queries, prefix + own)}
    inputs = attention_inputs(
        batch,
        kv_heads * groups,
        kv_heads,
        queries,
        own,
        draw.choice([1, 8, 19]),
        draw.choice([None, 4]),
        prefix,
        draw.choice(DTYPES),
        **options,
    )
    return ops.prefix_attention, dict(zip(NAMES, inputs.tensors, strict=True)) | inputs.options


def merge_states(draw: random.Random) -> Call:
    shape, dtype = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))], draw.choice(DTYPES)
    made: dict[str, Any] = {}
    for which in "ab":
        made |= {f"out_{which}": torch.randn(shape).to(dtype), f"lse_{which}": torch.randn(shape[:-1])}
    return ops.merge_states, made


def prompt_concat(draw: random.Random) -> Call:
    batch, own, width, vocabulary, length = 2, draw.randint(1, 4), draw.choice([1, 8, 20]), 7, draw.randint(1, 4)
    ids = draw.random() < 0.7
    dtype = draw.choice(DTYPES)
    made: dict[str, Any] = {
        "tokens": torch.randint(vocabulary, (batch, own)) if ids else torch.randn(batch, own, width).to(dtype),
        "table": torch.randn(vocabulary, width).to(dtype) if ids else None,
        "prompt": torch.randn(length, width),
        "scale": 1.5,
        "padding_side": draw.choice(["left", "right"]),
    }
    if draw.random() < 0.5:
        made |= {
            "prompt_offsets": torch.tensor([0, 1, length]),
            "prompt_index": torch.tensor([draw.randint(-1, 1), 0]),
        }
        made |= {"prompt_length": length}
    if draw.random() < 0.5:
        made |= {"own_start": torch.tensor([0, draw.randint(0, own)], dtype=torch.int32)}
    return ops.prompt_concat, made


def prompt_qkv(draw: random.Random) -> Call:
    batch, length, width, q_heads, kv_heads, head_dim = 2, draw.randint(1, 3), draw.choice([8, 20]), 2, 1, 4
    dtype = draw.choice(DTYPES)
    rows = (q_heads + 2 * kv_heads) * head_dim
    made: dict[str, Any] = {
        "tokens": torch.randn(batch, length, width).to(dtype),
        "weight": (torch.randn(rows, width) / width**0.5).to(dtype),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "norm": draw.choice(["rms", "layer", "none"]),
        "eps": 1e-6,
    }
    if draw.random() < 0.5:
        made |= {"bias": torch.randn(rows).to(dtype)}
    if made["norm"] != "none" and draw.random() < 0.5:
        made |= {"norm_weight": torch.randn(width).to(dtype)}
    if draw.random() < 0.5:
        angle = torch.randn(1, length, head_dim)
        made |= {"cos": angle.cos(), "sin": angle.sin(), "interleaved": draw.random() < 0.5}
    return ops.prompt_qkv, made


GOOD = {f.__name__: f for f in (prefix_attention, merge_states, prompt_concat, prompt_qkv)}
# Ops without C++ kernels answer every call with the same refusal.
SERVED = {name: make for name, make in GOOD.items() if not _registry.available_backends(name)["cpu"]}


# ---- bad calls of the ops -------------------------------------------------------------------------------------------


def resized(x: Tensor, draw: random.Random) -> Tensor:
    if x.dim() == 0:
        return x[None]
    dim = draw.randrange(x.dim())
    return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim) if draw.random() < 0.5 else x.narrow(dim, 0, 0)


def without_memory(x: Tensor, draw: random.Random) -> Tensor:
    if x.dim() < 3 or not x.dtype.is_floating_point:
        return x[None]  # torch itself dies of reading an index without memory
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def any_values(x: Tensor, draw: random.Random) -> Tensor:
    """Index values around and far outside what makes sense; NaN where the contracts allow it."""
    if x.dtype.is_floating_point:
        return torch.full_like(x, float("nan"))
    wild = [-(2**31), 2**31 - 1] + ([-(2**63), 2**63 - 1] if x.dtype == torch.int64 else [])
    choices = [*range(-2, 10), *wild]
    return torch.tensor([draw.choice(choices) for _ in range(x.numel())], dtype=x.dtype).reshape(x.shape)


TENSOR_CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda x, draw: x[None],
    lambda x, draw: x.flatten() if x.dim() != 1 else x[:, None],
    resized,
    resized,
    lambda x, draw: x.to(draw.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
    lambda x, draw: x.to(draw.choice([torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])),
    lambda x, draw: x.to(torch.complex64),
    lambda x, draw: x.to("meta"),
    lambda x, draw: x.to_sparse() if x.dim() and x.dtype.is_floating_point else x,
    without_memory,
    # Nothing is wrong with these two, but their memory does not hold what they say.
    lambda x, draw: x._neg_view() if x.dtype.is_floating_point else x,
    lambda x, draw: x.narrow(0, 0, 1).expand(x.shape) if x.dim() and x.shape[0] else x,
    any_values,
    any_values,
)
#: Keys and values that a row does not see must be finite: multiplied by 0, a NaN stays one.
FINITE = NAMES[1:]
#: What the backends copy: torch itself dies of a copy of a tensor without memory.
COPIED = ("bias", "tokens", "cos", "sin")
NUMBERS = (None, True, False, -1, 0, 1, 3, 2**62, 1e30, 0.0, 2.5, -1.5, float("nan"))
OF_NO_TYPE = (None, 1, "x", [], [1.0], torch.ones(2))


def worse(call: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], bool]:
    """The call with some arguments changed, and whether they still have the right Python types."""
    call, typed = dict(call), draw.random() < 0.9
    for name in draw.sample(list(call), draw.choice([1, 1, 2, 3])):
        value = call[name]
        if not typed:
            call[name] = draw.choice(OF_NO_TYPE)
        elif isinstance(value, Tensor):
            changed = draw.choice(TENSOR_CHANGES)
            if (changed is any_values and name in FINITE) or (changed is without_memory and name in COPIED):
                changed = resized
            call[name] = changed(value, draw)
        elif isinstance(value, (bool, int, float)):
            call[name] = draw.choice([x for x in NUMBERS if isinstance(x, bool) == isinstance(value, bool)])
    return call, typed


def exact(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def same(found: Any, want: Any) -> bool:
    if isinstance(found, tuple):
        return len(found) == len(want) and all(map(same, found, want))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[found.dtype]
    return found.shape == want.shape and torch.allclose(
        found.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def bad_op_call(draw: random.Random) -> tuple[str, str | None]:
    """How a call ended; and, where that is not allowed, what happened."""
    name = draw.choice(list(SERVED))
    function, good = SERVED[name](draw)
    call, typed = worse(good, draw)
    options = {"return_lse": True} if name == "prefix_attention" else {}
    try:
        found = function(**call, **options, backend="cpu")
    except CHECKED as error:
        text = f"{type(error).__name__}: {error}"
        said = re.search("expected", text, re.IGNORECASE) and re.search("found", text)
        # A backend that was asked for and can't run lists its reasons and what it was called with.
        said = said or (isinstance(error, _registry.BackendError) and "called with" in text) or not typed
        # A token id and the size of the vocabulary; a result that no memory holds.
        said = said or re.search(r"id -?\d+ in row .* outside the vocabulary of \d+|Storage size .* overflowed", text)
        return type(error).__name__, None if said else f"{name}: {text}"
    except Exception as error:  # Python's own, for a value of no use to it
        wanted = isinstance(error, TypeError) or (isinstance(error, (AttributeError, OverflowError)) and not typed)
        return type(error).__name__, None if wanted else f"{name}: {type(error).__name__}: {error}"
    if call.get("scale") in (2**62, 1e30):  # beyond the range of 16 bits: the rounding of the reference differs
        return "returned", None
    try:
        want = function(**{key: exact(value) for key, value in call.items()}, **options, backend="reference")
    except Exception as error:
        return "other", f"{name}: returned, where the reference raises {type(error).__name__}: {error}"
    if name == "prefix_attention":
        real = unpadded(call)
        found, want = ([x[0] * real, x[1].masked_fill(real[..., 0] == 0, 0.0)] for x in (found, want))
        found, want = tuple(found), tuple(want)
    return "returned", None if same(found, want) else f"{name}: wrong result"


def unpadded(call: dict[str, Any]) -> Tensor:
    """1 where a query is no padding, whose result is unspecified: ``[B, 1, S, 1]``."""
    (batch, _, queries, _), own = call["query"].shape, call["key"].shape[2]
    values = {"own_start": 0, "own_end": own, "query_start": own - queries}
    for name, default in values.items():
        given = call.get(name)
        values[name] = torch.full((batch, 1), default) if given is None else given[:, None].to(torch.int64)
    position = values["query_start"].clamp(-(2**40), 2**40) + torch.arange(queries)
    return ((position >= values["own_start"]) & (position < values["own_end"]))[:, None, :, None].to(torch.int64)


# ---- bad calls of the C++ ops below them ----------------------------------------------------------------------------


def worse_number(value: Any, draw: random.Random) -> Any:
    """Another number, or something else."""
    choices = [None, "x", 2.5, [], (), 2**64]
    if isinstance(value, bool):
        choices += [False]
    elif isinstance(value, float):
        choices += [float("nan"), -1.0, 0.0, 1e300]
    elif isinstance(value, int):
        choices += [draw.randint(0, value), 0, -1, 2**62, -(2**63)]
    return draw.choice(choices)


class Changed:
    """A C++ op, of which every call is first made with an argument changed at random: a tensor is cut, turned, of
    another dtype, or left out. What the last, good call writes is checked like that of any other."""

    def __init__(self, op: Any, draw: random.Random, times: int, endings: Counter[str]) -> None:
        self.op, self.draw, self.times, self.endings = op, draw, times, endings

    def __call__(self, *args: Any, **results: Tensor) -> Any:
        for _ in range(self.times):
            place = self.draw.randrange(len(args))
            bad = [*args[:place], worse_tensor(args[place], self.draw), *args[place + 1 :]]
            try:  # what it writes is written again by the good call
                self.endings[f"C++: {'returned' if self.op(*bad, **results) else 'refused'}"] += 1
            except (ValueError, RuntimeError, TypeError) as error:
                self.endings[f"C++: {type(error).__name__}"] += 1
        return self.op(*args, **results)


def worse_tensor(value: Any, draw: random.Random) -> Any:
    """What an op's schema lets pass, mostly."""
    if not isinstance(value, Tensor):
        return worse_number(value, draw)
    if not value.is_floating_point():  # never other values: what stands there was checked by the op, not by C++
        return draw.choice([None, value[:-1], value.to(torch.float32), value[None]])
    choices: list[Any] = [None, value[None], value.flatten()]
    if value.dim():
        choices += [value[..., :-1], value[1:], value.transpose(0, -1)]
    choices += [value.to(dtype) for dtype in (torch.float64, torch.float16, torch.int8, torch.bool)]
    return draw.choice(choices)


@contextmanager
def changed(draw: random.Random, times: int, endings: Counter[str]) -> Iterator[None]:
    modules = [sys.modules[f"softprompt_fast.backends.cpu.{name}"] for name in SERVED]
    names = ("_OUT", "_BACKWARD")
    found = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    try:
        for module, name, op in found:
            setattr(module, name, Changed(op, draw, times, endings))
        with poisoned_memory():  # then no call goes past them
            yield
    finally:
        for module, name, op in found:
            setattr(module, name, op)


def bad_native_calls(draw: random.Random, times: int, endings: Counter[str]) -> str | None:
    """A good call of an op, and ``times`` bad ones of each C++ op that it calls."""
    name = draw.choice([name for name in SERVED if name != "prompt_qkv"])  # its products are no op of their own
    function, call = SERVED[name](draw)
    for key in ("query", "out_a", "prompt"):
        if key in call:
            call[key] = call[key].requires_grad_(draw.random() < 0.5)
    want = function(**call, backend="cpu")
    with changed(draw, times, endings):
        found = function(**call, backend="cpu")
        first = found[0] if isinstance(found, tuple) else found
        if first.requires_grad:
            first.sum().backward()
    found, want = (tuple(x) if isinstance(x, tuple) else (x,) for x in (found, want))
    return None if all(map(torch.equal, found, want)) else f"{name}: bad calls changed the good one's result"


def main(count: int, seed: int) -> int:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    endings: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for _ in range(count // 2):
        ending, why = bad_op_call(draw)
        endings[ending] += 1
        wrong[why] += why is not None
    while sum(endings.values()) < count:
        why = bad_native_calls(draw, 8, endings)
        wrong[why] += why is not None
    for ending, times in sorted(endings.items()):
        print(f"{times:6} {ending}")
    found = [f"{times} x {why}" for why, times in wrong.most_common(20) if times]
    print(f"{sum(endings.values())} calls of {', '.join(SERVED)}; {sum(wrong.values())} wrong", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
