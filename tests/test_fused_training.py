# SPDX-License-Identifier: Apache-2.0
"""The fused training passes give the losses and gradients of the base's own modules, keep no more than they say, and
step aside (with a reason) where they would be wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import make_base, make_model, make_prompt, make_rows, pad_rows, relative_error
from test_fused_decoder import FUSED, LOOK_ALIKES, VARIANTS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_fast import SoftPromptModel
from softprompt_fast.backends import heuristics, native
from softprompt_fast.integrations import fused_decoder
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.fused_decoder import FusedDecoder, LazyDecoder
from softprompt_fast.integrations.fused_training import FusedTraining
from tests import families
from tests.families import FAMILIES

pytestmark = [
    pytest.mark.skipif(not native.status()[0], reason=f"C++ extension: {native.status()[1]}"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

ROWS = make_rows([4, 7, 1])
BATCH, LENGTH, LENGTHS = 3, 7, torch.tensor([4, 7, 1])


def with_head_bias() -> PreTrainedModel:
    base = make_base()
    base.lm_head.bias = nn.Parameter(torch.randn(base.config.vocab_size), requires_grad=False)
    return base


def variant(name: str) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_config(VARIANTS[name]()).eval()
    families.randomise(base, 1)
    return base


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: FAMILIES[name].make for name in FUSED},
    **{name: lambda name=name: variant(name) for name in VARIANTS},
    "a head with a bias": with_head_bias,
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return installed(BASES[request.param]())


def installed(base: PreTrainedModel) -> PreTrainedModel:
    return SoftPromptModel(base).base


def passes_of(base: PreTrainedModel) -> FusedTraining:
    found = LazyDecoder(base).get_training(None)
    assert isinstance(found, FusedTraining), found
    return found


# ---- the two passes against the base's own modules ------------------------------------------------------------------


@dataclass
class Inputs:
    """Own embeddings, and the keys and values of two packed prefixes, of 5 and 9 tokens; leaves of the graph."""

    embeds: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, base: PreTrainedModel) -> Inputs:
        torch.manual_seed(0)
        attention: Any = base.model.layers[0].self_attn
        size = base.get_input_embeddings().weight.std().item()
        shape = (attention.k_proj.out_features // attention.head_dim, 14, attention.head_dim)
        layers = range(hooks.num_attention_layers(base))
        embeds = torch.randn(BATCH, LENGTH, base.config.hidden_size) * size
        return cls(
            embeds.requires_grad_(),
            tuple(torch.randn(shape).requires_grad_() for _ in layers),
            tuple(torch.randn(shape).requires_grad_() for _ in layers),
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        embeds, *pairs = (x.detach().to(dtype).requires_grad_() for x in self.leaves)
        half = len(pairs) // 2
        return Inputs(embeds, tuple(pairs[:half]), tuple(pairs[half:]))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.embeds, *self.keys, *self.values]

    def context(self, side: str, index: list[int]) -> hooks.PrefixContext:
        start = (LENGTH - LENGTHS).int() if side == "left" else None
        end = LENGTHS.int() if side == "right" else None
        offsets, places = torch.tensor([0, 5, 14], dtype=torch.int32), torch.tensor(index, dtype=torch.int32)
        return hooks.PrefixContext(
            self.keys, self.values, prefix_offsets=offsets, prefix_index=places, own_start=start, own_end=end
        )


def layout(side: str, index: list[int]) -> tuple[Tensor, Tensor]:
    """Position ids, and the places of real tokens."""
    column = torch.arange(LENGTH)
    first = (LENGTH - LENGTHS)[:, None] if side == "left" else torch.zeros(BATCH, 1, dtype=torch.long)
    last = LENGTHS[:, None] if side == "right" else torch.full((BATCH, 1), LENGTH)
    virtual = torch.tensor([5, 9, 0])[torch.tensor(index)][:, None]
    return virtual + (column - first).clamp(min=0), ((column >= first) & (column < last)).flatten().nonzero()[:, 0]


def own_by_modules(base: PreTrainedModel, inputs: Inputs, side: str, index: list[int]) -> Tensor:
    """Logits ``[B * S, V]``."""
    context, (positions, _) = inputs.context(side, index), layout(side, index)
    out = base(
        inputs_embeds=inputs.embeds,
        attention_mask=hooks.no_mask(BATCH, torch.device("cpu")),
        position_ids=positions,
        use_cache=False,
        **{hooks.KEYWORD: context},
    )
    return out.logits.flatten(0, 1)


def assert_close(found: list[Tensor], oracle: list[Tensor], tolerance: float = 1e-4) -> None:
    for place, (x, y) in enumerate(zip(found, oracle, strict=True)):
        assert relative_error(x.double(), y.double()) <= tolerance, place


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("index", [[0, 1, -1], [1, 1, 1]], ids=["mixed", "one"])
@pytest.mark.parametrize("some", [False, True], ids=["all wanted", "some wanted"])
def test_own_pass(base: PreTrainedModel, side: str, index: list[int], some: bool) -> None:
    passes, inputs = passes_of(base), Inputs.of(base)
    positions, real = layout(side, index)
    wanted = real[1::2].flip(0) if some else real
    labels, weights = torch.randint(0, base.config.vocab_size, (len(wanted),)), torch.rand(len(wanted))
    hidden = passes.own(inputs.embeds, positions, inputs.context(side, index), wanted)
    loss = passes.head.sum(hidden, labels, weights)
    found = torch.autograd.grad(loss, inputs.leaves)
    exact = inputs.to(torch.float64)
    logits = own_by_modules(copy.deepcopy(base).double(), exact, side, index)[wanted]
    oracle = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert_close(list(found), list(torch.autograd.grad(oracle, exact.leaves)))
    assert_close([passes.head.logits(hidden)], [logits], 1e-5)


@pytest.mark.parametrize("wanted", [0, 1, None])
def test_prompt_pass(base: PreTrainedModel, wanted: int | None) -> None:
    passes, layers = passes_of(base), range(hooks.num_attention_layers(base))
    torch.manual_seed(0)
    embeds = torch.randn(2, 5, base.config.hidden_size) * base.get_input_embeddings().weight.std()
    embeds.requires_grad_()
    exact = embeds.detach().double().requires_grad_()
    keys, values, hidden = passes.prompt(embeds, wanted)
    assert hidden.shape == (2, 5 if wanted is None else wanted, base.config.hidden_size)
    logits = passes.head.logits(hidden.flatten(0, 1))
    capture = hooks.CaptureContext()
    out = copy.deepcopy(base).double()(inputs_embeds=exact, use_cache=False, **{hooks.KEYWORD: capture})
    expected = [capture.keys[i] for i in layers], [capture.values[i] for i in layers]
    assert_close([*keys, *values], [*expected[0], *expected[1]], 1e-5)
    upstream = [torch.randn_like(x) for x in (*keys, *values, logits)]
    (found,) = torch.autograd.grad([*keys, *values, logits], embeds, upstream)
    exact_logits = out.logits[:, 5 - hidden.shape[1] :].flatten(0, 1)
    (oracle,) = torch.autograd.grad(
        [*expected[0], *expected[1], exact_logits], exact, [x.double() for x in upstream], retain_graph=True
    )
    assert_close([found], [oracle])
    # Some results may have no gradient at all.
    keys, _, _ = passes.prompt(embeds, wanted)
    (found,) = torch.autograd.grad(keys[-1].sum(), embeds)
    (oracle,) = torch.autograd.grad(expected[0][-1].sum(), exact)
    assert_close([found], [oracle])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    base = installed(make_base())
    passes, inputs = passes_of(base), Inputs.of(base)
    labels = torch.randint(0, base.config.vocab_size, (BATCH * LENGTH,))

    def gradient(rows: list[int], side: str) -> list[Tensor]:
        index = [0, 1, -1]
        positions, real = layout(side, index)
        context = inputs.context(side, index)
        picked = torch.tensor(rows)
        for name in ("prefix_index", "own_start", "own_end"):
            if (values := getattr(context, name)) is not None:
                setattr(context, name, values[picked])
        places = torch.cat([n * LENGTH + real[real // LENGTH == row] % LENGTH for n, row in enumerate(rows)])
        hidden = passes.own(inputs.embeds[picked], positions[picked], context, places)
        of_row = labels[torch.cat([real[real // LENGTH == row] for row in rows])]
        return list(torch.autograd.grad(passes.head.sum(hidden, of_row), inputs.leaves))

    for side in ("left", "right"):
        together = gradient([0, 1, 2], side)
        apart = [gradient([row], side) for row in range(BATCH)]
        assert_close(together, [sum(parts) for parts in zip(*apart, strict=True)], 1e-5)


def test_checkpointing_gives_the_same_bits() -> None:
    base = installed(make_base())
    inputs, index = Inputs.of(base), [0, 1, -1]
    positions, real = layout("left", index)
    prompt = torch.randn(2, 5, base.config.hidden_size, requires_grad=True)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable()
        base.train()
        passes = passes_of(base)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            loss = passes.head.sum(passes.own(inputs.embeds, positions, inputs.context("left", index), real), real % 7)
            keys, values, hidden = passes.prompt(prompt, 1)
        own = torch.autograd.grad(loss, inputs.leaves)
        prompts = torch.autograd.grad(
            [*keys, *values, hidden], prompt, [torch.ones_like(x) for x in (*keys, *values, hidden)]
        )
        results.append((loss, *own, *prompts))
        # A layer keeps its input, and nothing as wide as its MLP.
        width = base.config.intermediate_size
        assert any(x.shape[-1] == width for x in kept) != checkpointing
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# ---- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 100])
def test_loss_in_chunks(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = installed(make_base())
    head = passes_of(base).head
    monkeypatch.setattr(heuristics, "head_rows", lambda rows, vocab_size: min(max(rows, 1), step))
    torch.manual_seed(0)
    hidden = torch.randn(8, base.config.hidden_size, requires_grad=True)
    labels, weights = torch.randint(0, base.config.vocab_size, (8,)), torch.randn(8)
    labels[2] = -100
    exact = hidden.detach().double().requires_grad_()
    double = copy.deepcopy(base).double()
    logits = double.lm_head(double.model.norm(exact))
    for given in (None, weights, weights.double().repeat_interleave(2)[::2]):
        losses = F.cross_entropy(logits, labels, reduction="none")
        oracle = (losses if given is None else losses * given).sum()
        (expected,) = torch.autograd.grad(oracle, exact, retain_graph=True)
        found = head.sum(hidden, labels, given)
        assert found.item() == pytest.approx(oracle.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(3 * found, hidden)
        assert_close([gradient], [3 * expected], 1e-5)
        with torch.no_grad():
            assert head.sum(hidden, labels, given).item() == pytest.approx(oracle.item(), rel=1e-5)


def test_nothing_labelled() -> None:
    base = installed(make_base())
    passes, inputs = passes_of(base), Inputs.of(base)
    positions, _ = layout("left", [0, 1, -1])
    hidden = passes.own(inputs.embeds, positions, inputs.context("left", [0, 1, -1]), torch.arange(0))
    loss = passes.head.sum(hidden, torch.arange(0))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs.leaves, allow_unused=True):
        assert gradient is None or not gradient.any()


# ---- what is computed and kept --------------------------------------------------------------------------------------


def counted(passes: FusedTraining, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every call of a kernel, with its number of rows."""
    calls: list[tuple[str, int]] = []

    def spied(name: str) -> Callable[..., Any]:
        call = getattr(passes._stack._ops, name)
        return lambda x, *args, **kwargs: calls.append((name, len(x))) or call(x, *args, **kwargs)

    names = ("product", "gated_product", "gated_product_backward", "norm_rows", "norm_rows_backward", "rotate_rows")
    monkeypatch.setattr(passes._stack, "_ops", SimpleNamespace(**{name: spied(name) for name in names}))
    return calls


def test_layers_see_real_tokens_and_the_last_one_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    base = installed(make_base())
    passes, inputs, index = passes_of(base), Inputs.of(base), [0, 1, -1]
    calls = counted(passes, monkeypatch)
    positions, real = layout("left", index)
    hidden = passes.own(inputs.embeds, positions, inputs.context("left", index), real[:2])
    assert [rows for name, rows in calls if name == "gated_product"] == [12, 2]
    # Keys and values of all tokens; queries and output projection of the two.
    assert sorted(rows for name, rows in calls[-20:] if name == "product")[:2] == [2, 2]
    calls.clear()
    hidden.sum().backward()
    assert [rows for name, rows in calls if name == "gated_product_backward"] == [2, 12]
    calls.clear()
    passes.prompt(torch.randn(1, 5, base.config.hidden_size), 0)
    assert [rows for name, rows in calls if name == "gated_product"] == [5]


def test_the_first_layers_backward_ends_at_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    base = installed(make_base())
    passes, inputs = passes_of(base), Inputs.of(base)
    positions, real = layout("none", [0, 0, 0])
    products = []
    for embeds in (inputs.embeds, inputs.embeds.detach()):
        calls = counted(passes, monkeypatch)
        loss = passes.own(embeds, positions, inputs.context("none", [0, 0, 0]), real).sum()
        calls.clear()
        products.append(torch.autograd.grad(loss, inputs.keys) and calls.copy())
    # Queries, keys and values of one layer less, and its norm.
    fewer = {name: sum(n == name for n, _ in products[0]) - sum(n == name for n, _ in products[1]) for name in
             ("product", "norm_rows_backward", "rotate_rows")}  # fmt: skip
    assert fewer == {"product": 3, "norm_rows_backward": 1, "rotate_rows": 2}


def test_what_is_kept() -> None:
    base = installed(make_base())
    passes, inputs, index = passes_of(base), Inputs.of(base), [0, 0, 0]
    positions, real = layout("none", index)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        loss = passes.head.sum(passes.own(inputs.embeds, positions, inputs.context("none", index), real), real % 7)
    config: Any = base.config
    tokens, heads, kv_heads = BATCH * LENGTH, config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    # The residual stream twice, queries and attention's result, keys and values, its lse, gate and up projections.
    of_token = 2 * config.hidden_size + 2 * (heads + kv_heads) * dim + heads + 2 * config.intermediate_size
    inside = config.num_hidden_layers * tokens * of_token
    prefixes = sum(x.numel() for x in (*inputs.keys, *inputs.values))
    assert sum(x.numel() for x in kept.values()) == inside + prefixes + tokens * config.hidden_size
    weights = {p.data_ptr() for p in base.parameters()}
    assert not any(x.data_ptr() in weights or x.shape[-1] == config.vocab_size for x in kept.values())
    loss.backward()
    assert all(p.grad is None for p in base.parameters())


def test_graphs_behave_as_pytorchs() -> None:
    base = installed(make_base())
    passes, inputs = passes_of(base), Inputs.of(base)
    positions, real = layout("left", [0, 1, -1])

    def loss() -> Tensor:
        hidden = passes.own(inputs.embeds, positions, inputs.context("left", [0, 1, -1]), real)
        return passes.head.sum(hidden, real % 7)

    first = loss()
    once = torch.autograd.grad(first, inputs.leaves, retain_graph=True)
    twice = torch.autograd.grad(first, inputs.leaves)
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()
    with pytest.raises(RuntimeError, match="create_graph: the fused training passes have no second derivative"):
        torch.autograd.grad(loss(), inputs.keys[:1], create_graph=True)
    changed = loss()
    with torch.no_grad():
        inputs.keys[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.backward()
    with torch.no_grad():
        assert loss().grad_fn is None
        keys, values, hidden = passes.prompt(inputs.embeds, 1)
    assert not any(x.requires_grad for x in (*keys, *values, hidden))


@pytest.mark.parametrize("changes", ["in place", "moved", "another dtype"])
def test_weights_that_change_before_the_backward_pass(changes: str) -> None:
    """They are not saved for it but read again: an error, as in PyTorch, and no wrong gradient."""
    model = trained()
    ids, mask = pad_rows(ROWS, "left")
    out = model(ids, attention_mask=mask, labels=ids, return_logits=False)
    predicted = model._select("t", None, 1).packed.next_logits[0]
    weight = model.base.model.layers[1].mlp.down_proj.weight
    if changes == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif changes == "moved":
        weight.data = 2 * weight.data
    else:
        model.to(torch.float64)
    for result in (out.loss, predicted.sum()):
        with pytest.raises(RuntimeError, match="the base's weights changed between the forward and the backward pass"):
            result.backward()


def test_rows_of_one_token() -> None:
    """All at one position, whose rotation they share."""
    model, plain = trained(), trained()
    plain._fused._training_plan = "switched off by a test"
    ids = torch.tensor([[3], [4], [5]])

    def step(model: SoftPromptModel) -> list[Tensor]:
        loss = model(ids, labels=ids).loss
        return [loss.detach(), torch.autograd.grad(loss, model.get_prompt("t").embedding.weight)[0]]

    assert_close(step(model), step(plain))


# ---- which bases and calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FUSED])
def test_other_families_are_refused_with_a_reason(family: str) -> None:
    reason = SoftPromptModel(FAMILIES[family].make())._fused.get_training(None)
    assert isinstance(reason, str) and reason


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_base_of_the_same_structure_that_computes_something_else_is_refused(name: str) -> None:
    base = AutoModelForCausalLM.from_config(LOOK_ALIKES[name]()).eval()
    families.randomise(base, 1)
    reason = SoftPromptModel(base)._fused.get_training(None)
    assert isinstance(reason, str)
    assert "its logits differ from the fused pass" in reason or "activation ReLU is not one of" in reason


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran, but for those of planning."""
    seen: list[str] = []
    for name in ("prompt", "own"):
        run = getattr(FusedTraining, name)

        def recorded(self: FusedTraining, *args: Any, name: str = name, run: Any = run, **kwargs: Any) -> Any:
            seen.extend([name] * torch.is_grad_enabled())
            return run(self, *args, **kwargs)

        monkeypatch.setattr(FusedTraining, name, recorded)
    return seen


def trained(base: PreTrainedModel | None = None) -> SoftPromptModel:
    model = SoftPromptModel(make_base() if base is None else base)
    model.add_prompt("t", make_prompt(model.base, seed=4))
    return model.train()


def step(model: SoftPromptModel, **options: Any) -> tuple[Tensor, Tensor]:
    ids, mask = pad_rows(ROWS, "left")
    loss = model(ids, attention_mask=mask, labels=ids, **options).loss
    parameter = model.get_prompt("t").embedding.weight
    return loss.detach(), torch.autograd.grad(loss, parameter)[0]


def test_a_training_step_is_fused_and_packs_nothing(passes: list[str]) -> None:
    model = trained()
    found = step(model)
    assert passes == ["prompt", "own"] and not any(
        isinstance(plan, FusedDecoder) for plan in model._fused._plans.values()
    )
    assert model.explain().layers[0].path == "shared prefix, fused training"
    plain = trained()
    plain._fused._training_plan = "switched off by a test"
    assert "training not fused: switched off by a test" in plain.explain().layers[0].reason
    assert_close(list(found), list(step(plain)))
    assert passes == ["prompt", "own"]


def _hooked(model: SoftPromptModel) -> Any:
    return model.base.model.layers[0].register_forward_hook(lambda *args: None)


def _hooked_backward(model: SoftPromptModel) -> Any:
    return model.base.model.layers[0].register_full_backward_hook(lambda *args: None)


def _trainable(model: SoftPromptModel) -> None:
    model.base.lm_head.weight.requires_grad_(True)


def _replaced(model: SoftPromptModel) -> None:
    model.base.model.layers[0].mlp.act_fn = nn.SiLU()


def _changed(model: SoftPromptModel) -> None:
    with torch.no_grad():
        model.base.lm_head.weight.mul_(2)


@pytest.mark.parametrize(
    ("change", "context", "reason"),
    [
        (_hooked, nullcontext, "a module of the base has hooks"),
        (_hooked_backward, nullcontext, "a module of the base has hooks"),
        (_trainable, nullcontext, "weights of the base require grad"),
        (_replaced, nullcontext, "modules of the base were replaced"),
        (_changed, nullcontext, "the base's weights changed"),
        (None, lambda: FlopCounterMode(display=False), ""),
    ],
    ids=["hooks", "backward hooks", "trainable base", "replaced module", "changed weights", "dispatch mode"],
)
def test_steps_aside(
    change: Any, context: Any, reason: str, passes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = trained()
    step(model)
    passes.clear()
    if change is not None:
        change(model)
    with caplog.at_level(logging.INFO, logger="softprompt_fast"), context():
        step(model)
        step(model)
    assert not passes
    told = [record.message for record in caplog.records if "training is not fused" in record.message]
    assert len(told) == bool(reason) and all(reason in message for message in told)


def test_a_checkpointed_step_is_fused(passes: list[str]) -> None:
    model = trained()
    expected = step(model)
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(x, y) for x, y in zip(step(model), expected, strict=True))
    assert passes == ["prompt", "own"] * 2
    fresh = trained()
    fresh.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(x, y) for x, y in zip(step(fresh), expected, strict=True))
    assert passes == ["prompt", "own"] * 3


def test_dropout_takes_the_base(passes: list[str]) -> None:
    config = families._llama_like(transformers.LlamaConfig, attention_dropout=0.5)
    model = trained(AutoModelForCausalLM.from_config(config).eval())
    step(model)
    assert not passes
    model.eval()
    model(ROWS[1][None], labels=ROWS[1][None]).loss.backward()
    assert passes == ["prompt"]


def test_backend_environment_and_autocast(passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model._fused.get_training(None) == "autocast is on"
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "torch")
    expected = step(model)
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "cpu")
    monkeypatch.setenv(fused_decoder.PACK_VARIABLE, "0")
    assert_close(list(step(model)), list(expected))
    assert not passes
    monkeypatch.setenv(fused_decoder.PACK_VARIABLE, "1")
    model.invalidate()
    assert_close(list(step(model)), list(expected))
    assert passes == ["prompt", "own"]


def test_own_embeddings_behind_a_frozen_prompt(passes: list[str]) -> None:
    model = make_model().train()
    embeds = model.get_input_embeddings()(ROWS[1])[None].requires_grad_()
    results = []
    for plan in (None, "switched off by a test"):
        model._fused._training_plan = plan
        loss = model(inputs_embeds=embeds, labels=ROWS[1][None], prompt="a").loss
        results.append([loss, *torch.autograd.grad(loss, embeds)])
    assert_close(*results)
    assert passes == ["own"]


def test_threads_train_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = trained()
    expected = step(model)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: step(model), range(8)):
            assert_close(list(found), list(expected), 1e-6)


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
