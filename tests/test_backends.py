# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softprompt_fast import ops
from softprompt_fast.backends import _registry, heuristics, native_ops
from softprompt_fast.backends._registry import BACKENDS, OPS, BackendError, Backends, available_backends, requested
from softprompt_fast.testing import attention_inputs, poisoned_memory

VARIABLE = _registry.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(_registry, "_told", set())


@pytest.mark.parametrize("op", OPS)
def test_available_backends(op: str) -> None:
    found = available_backends(op)
    assert tuple(found) == BACKENDS
    assert found["reference"] == [] and found["torch"] == []
    for name, reasons in found.items():
        assert all(isinstance(r, str) and r for r in reasons), name
    for name in ("cpu", "triton", "cuda"):  # each comes with its own kernels, or says that it did not
        assert found[name] == [] or op in found[name][0]


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"op: expected one of prefix_attention, .*, found 'attention'"):
        available_backends("attention")


def test_argument_beats_environment_beats_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested() == "auto"
    monkeypatch.setenv(VARIABLE, "")
    assert requested() == "auto"
    monkeypatch.setenv(VARIABLE, "reference")
    assert requested() == "reference"
    assert requested("torch") == "torch" and requested("auto") == "auto"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(
        ValueError, match=rf"environment {VARIABLE}: expected 'auto' or one of reference, torch.*'fast'"
    ):
        requested()
    assert requested("torch") == "torch"
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of reference, torch.*found 'slow'"):
        requested("slow")


def spy(monkeypatch: pytest.MonkeyPatch, backends: Backends, name: str, reasons: list[str]) -> list[str]:
    """Put a backend that records its calls into an op's table."""
    calls: list[str] = []
    real = backends["torch"]

    def forward(*args):
        calls.append("forward")
        return real.forward(*args)

    module = types.ModuleType(name)
    module.reasons, module.forward, module.backward = lambda *args: reasons, forward, real.backward
    monkeypatch.setitem(backends.modules, name, module)
    if name in backends.missing:
        monkeypatch.delitem(backends.missing, name)
    return calls


# ``ops.prefix_attention`` is the function; its module has the table.
TABLE = sys.modules["softprompt_fast.ops.prefix_attention"].BACKENDS


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = spy(monkeypatch, TABLE, heuristics.backend_order("cpu")[0], [])
    ops.prefix_attention(*attention_inputs().tensors)
    assert calls == ["forward"] and not caplog.records


def test_auto_goes_on_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = spy(monkeypatch, TABLE, "cpu", ["heads of 16 are not supported"])
    with caplog.at_level(logging.WARNING, logger="softprompt_fast"):
        for _ in range(3):
            ops.prefix_attention(*attention_inputs().tensors)
    assert calls == []
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["prefix_attention runs on backend 'torch' (cpu: heads of 16 are not supported)"]


def test_explicit_request_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    spy(monkeypatch, TABLE, "cpu", ["heads of 16 are not supported", "no masks"])
    with pytest.raises(BackendError) as error:
        ops.prefix_attention(*attention_inputs().tensors, backend="cpu")
    for part in ("'cpu'", "cpu: heads of 16 are not supported", "cpu: no masks", "float32 [3, 4, 5, 16] on cpu"):
        assert part in str(error.value)
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(BackendError):
        ops.prefix_attention(*attention_inputs().tensors)


@pytest.mark.parametrize("name", [n for n in BACKENDS if available_backends("prefix_attention")[n]])
def test_missing_backend_says_what_is_missing(name: str) -> None:
    with pytest.raises(BackendError, match="prefix_attention are not part of this version"):
        ops.prefix_attention(*attention_inputs().tensors, backend=name)


def test_environment_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, TABLE, "torch", [])
    inputs = attention_inputs()
    monkeypatch.setenv(VARIABLE, "reference")
    want = ops.prefix_attention(*inputs.tensors)
    assert calls == []
    monkeypatch.setenv(VARIABLE, "torch")
    torch.testing.assert_close(ops.prefix_attention(*inputs.tensors), want)
    assert calls == ["forward"]


def test_a_broken_backend_does_not_break_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise ImportError(f"cannot load {name}")

    monkeypatch.setattr(_registry.importlib, "import_module", broken)
    _registry._load.cache_clear()
    try:
        assert available_backends("merge_states")["torch"] == [
            "cannot load softprompt_fast.backends.torch.merge_states"
        ]
    finally:
        _registry._load.cache_clear()


def test_backend_order() -> None:
    assert heuristics.backend_order("cpu") == ("cpu", "torch", "reference")
    assert heuristics.backend_order("cuda") == ("triton", "torch", "reference")
    assert heuristics.backend_order("mps") == ("torch", "reference")
    assert all(order[-1] == "reference" for order in map(heuristics.backend_order, ("cpu", "cuda", "xpu")))


def test_join_keys() -> None:
    """The worked example, and the trend: more rows or longer prefixes are cheaper to attend to apart."""
    width = 3 * (64 + 64)
    assert heuristics.join_keys(1, 116, width)
    assert not heuristics.join_keys(32, 116, width)
    assert not heuristics.join_keys(1, 2048 + 16, width)


def test_fuse_projection() -> None:
    assert heuristics.fuse_projection(64)
    assert not heuristics.fuse_projection(32 * (128 + 128))


def test_head_rows() -> None:
    """The worked examples, and never a chunk of nothing."""
    assert heuristics.head_rows(496, 49152) == 248 and heuristics.head_rows(1000, 262144) == 63
    assert [heuristics.head_rows(rows, 49152) for rows in (0, 5)] == [1, 5]


def test_score_rows() -> None:
    assert heuristics.score_rows(96, 1024, 2048) == 21
    assert heuristics.score_rows(3, 96, 512) == 96
    assert heuristics.score_rows(1 << 20, 7, 1 << 20) == 1  # never none
    for heads, rows, keys in ((1, 1, 0), (0, 5, 9), (12, 4096, 4096)):
        assert 1 <= heuristics.score_rows(heads, rows, keys) <= rows


def test_stack_queries() -> None:
    """The worked examples; a single query is stacked however many heads share a key."""
    assert heuristics.stack_queries(16, 4) and not heuristics.stack_queries(17, 4)
    assert heuristics.stack_queries(1, 1) and heuristics.stack_queries(1, 128)
    assert not heuristics.stack_queries(2, 128)


def test_l2_section() -> None:
    assert heuristics.l2_section(128, 2 * 512 * 128 * 2) == 128
    assert heuristics.l2_section(128, 2 * 8192 * 128 * 2) == 8
    assert heuristics.l2_section(3, 0) == 3  # no own keys
    assert heuristics.l2_section(0, 1 << 40) == 1  # never none: it is divided by


def test_score_blocks_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores computed in blocks of one, two and all rows are the same scores."""
    inputs = attention_inputs(softcap=2.0, own_start=[0, 1, 2], dtype=torch.float64).requires_grad_()
    module = TABLE["torch"]
    results = []
    for step in (1, 2, 1000):
        monkeypatch.setattr(module, "score_rows", lambda heads, rows, keys, step=step: step)
        out = ops.prefix_attention(*inputs.tensors, **inputs.options, backend="torch")
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs.tensors)))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_joined_keys_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(queries=1, dtype=torch.float64)
    results = []
    for joined in (True, False):
        monkeypatch.setattr(TABLE["torch"], "join_keys", lambda *args, joined=joined: joined)
        results.append(ops.prefix_attention(*inputs.tensors, return_lse=True, backend="torch"))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# ---- C++ ops that are tried first -----------------------------------------------------------------------------------

x, prefix = torch.randn(2, 4, 3, 8), torch.randn(4, 5, 8)
lse = torch.randn(2, 4, 3)
DIRECT: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "prefix_attention": (ops.prefix_attention, (x, x, x, prefix, prefix)),
    "merge_states": (ops.merge_states, (x, lse, x, lse)),
    "prompt_concat": (
        lambda tokens, *args, **options: ops.prompt_concat(tokens, None, *args, **options),
        (x[0], x[0, 0]),
    ),
}
needs_cpu = pytest.mark.skipif(bool(_registry.available_backends("merge_states")["cpu"]), reason="no C++ extension")


def first(results: Any) -> Any:
    return results[0] if isinstance(results, tuple) else results


@pytest.fixture(params=DIRECT)
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, tuple[Any, ...], list[Any]]:
    """An op, arguments, and what its C++ op gave since."""
    op, args = DIRECT[request.param]
    module, given = importlib.import_module(f"softprompt_fast.backends.cpu.{request.param}"), []
    native = module.NATIVE
    monkeypatch.setattr(module, "NATIVE", lambda *args: (given.append(native(*args)), given[-1])[1])
    return op, args, given


@needs_cpu
def test_the_op_in_cpp_is_tried_first(direct: Any) -> None:
    op, args, given = direct
    for backend in (None, "auto", "cpu"):
        given.clear()
        found = op(*args, backend=backend)
        assert len(given) == 1 and first(found) is first(given[0])
    want = op(*args, backend="reference")
    assert len(given) == 1
    torch.testing.assert_close(found, want)


@needs_cpu
def test_what_is_asked_for_is_asked_first(direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op, args, given = direct
    op(*args, backend="torch")
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "torch")
    op(*args)
    assert not given


@needs_cpu
def test_gradients_go_the_long_way(direct: Any) -> None:
    op, args, given = direct
    for place in range(len(args)):
        leaves = [a.clone().requires_grad_(i == place) for i, a in enumerate(args)]
        found = op(*leaves)
        first(found).sum().backward()
        assert not given and leaves[place].grad is not None
    with torch.no_grad():
        op(*leaves)
    assert len(given) == 1
    given.clear()
    with poisoned_memory():
        op(*args)
    assert not given


@needs_cpu
def test_what_it_refuses_goes_on(direct: Any) -> None:
    """To a backend that takes it, or to the error that says what is wrong."""
    op, args, given = direct
    doubles = tuple(a.double() for a in args)
    torch.testing.assert_close(op(*doubles), op(*doubles, backend="reference"))
    assert [first(result) for result in given] == [None]
    for wrong in (args[0][0], args[0].int()):
        with pytest.raises(ValueError, match="expected"):
            op(wrong, *args[1:])


@needs_cpu
@pytest.mark.parametrize("name", ["prefix_attention", "merge_states"])
def test_opcheck_of_the_ops_in_cpp(name: str) -> None:
    _, args = DIRECT[name]
    if name == "prefix_attention":
        args = (*args, *(None,) * 6, True, *(None,) * 8)
    out, lse = getattr(native_ops, f"{name}_results")(*args)
    packet = getattr(torch.ops.softprompt_fast, f"{name}_cpu")
    checks = ("test_schema", "test_faketensor")  # they have no gradient
    torch.library.opcheck(packet.default, args, test_utils=checks)
    torch.library.opcheck(packet.out, args, {"out": out, "lse": lse}, test_utils=checks)
