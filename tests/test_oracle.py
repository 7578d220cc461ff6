# SPDX-License-Identifier: Apache-2.0
"""Is the oracle right, and would the family matrix notice a mistake? No code of softprompt_fast runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from tests.families import FAMILIES, METHODS, NUM_VIRTUAL_TOKENS, PREFIX_METHODS, Family, make_peft
from tests.oracle import (
    CASES,
    GRADIENT_TOLERANCE,
    IGNORED,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    Row,
    batch_gradients,
    batch_loss,
    forward_alone,
    greedy_alone,
    make_batch,
    make_rows,
    oracle_model,
    own_logits,
    peft_generate_alone,
    run_alone,
)

ALL_ROWS = sorted({row for case in CASES for row in case.rows}, key=lambda row: (len(row), row.ids))
EMBEDDING_METHODS = sorted(METHODS.keys() - PREFIX_METHODS)
WINDOWED = sorted(name for name in FAMILIES if getattr(FAMILIES[name].make().config, "sliding_window", None))

# What a mistake must do to be seen for sure: move logits by this many tolerances.
VISIBLE = 1000 * LOGIT_TOLERANCE


def logit_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected logit."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def prompt_embeddings(family: str, method: str, row: Row) -> Tensor:
    """PEFT's virtual tokens for the row, [1, P, H]."""
    return oracle_model(family, method).get_prompt(1, task_ids=torch.tensor([row.task])).detach()


def run_plain(model: PreTrainedModel, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits [P + S, V] of plain transformers over the concatenated embeddings."""
    embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([prompt, embeddings], dim=1)).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_methods_equal_plain_transformers(family: str) -> None:
    model = FAMILIES[family].make()
    for method in EMBEDDING_METHODS:
        for row in ALL_ROWS:
            expected = run_plain(model, prompt_embeddings(family, method, row), row.ids)
            result = forward_alone(family, method, row)
            torch.testing.assert_close(result.logits, expected[NUM_VIRTUAL_TOKENS:], rtol=0, atol=1e-5)
            # Every own token, the first one included, is predicted by the position before it.
            terms = cross_entropy(
                expected[NUM_VIRTUAL_TOKENS - 1 : -1],
                torch.tensor(row.labels),
                reduction="none",
                ignore_index=IGNORED,
            )
            loss_sum = terms.sum().item()
            if method == "cpt":
                # One virtual token is a label, one label older than the row's own: it weighs one decay step less.
                config = oracle_model(family, method).active_peft_config
                label = torch.tensor(config.cpt_token_ids[-1])
                loss_sum += 0.7 * cross_entropy(expected[NUM_VIRTUAL_TOKENS - 2], label).item()
            assert result.loss_sum == pytest.approx(loss_sum, rel=LOSS_TOLERANCE), f"{method}, {len(row)} tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_methods_treat_keys_and_values_as_virtual_tokens(family: str) -> None:
    """A prompt's own keys and values, handed to PEFT as a cartridge, must do what the prompt does.

    That ties positions, windows and masks of the prefix methods to those of plain virtual tokens.
    """
    row = make_rows((8,))[0]
    cache = DynamicCache()  # of full layers whatever the model: a window must hide entries, not lose them
    with torch.no_grad():
        FAMILIES[family].make()(
            inputs_embeds=prompt_embeddings(family, "prompt_tuning", row), past_key_values=cache, use_cache=True
        )
    # PEFT's layout: [P, layers x (key, value) x heads x head dimension]
    pairs = torch.stack([part[0].transpose(0, 1) for layer in cache.layers for part in (layer.keys, layer.values)], 1)
    peft_model = make_peft(FAMILIES[family], "cartridge")
    peft_model.prompt_encoder["default"].load_prompt_embeddings(pairs.flatten(1))
    with torch.no_grad():
        actual = run_alone(peft_model, "cartridge", row.ids, row.task).logits[0]
    assert logit_error(actual, forward_alone(family, "prompt_tuning", row).logits) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_add_up_to_an_unpadded_batch(family: str) -> None:
    """Without padding PEFT's batches are right, so the loss and gradients put together from rows must equal them."""
    (case,) = (case for case in CASES if case.padding == "none" and len(case.rows) == 3)
    for method in METHODS:
        results = [forward_alone(family, method, row) for row in case.rows]
        peft_model = make_peft(FAMILIES[family], method)
        output = peft_model(**make_batch(case).inputs(method, labels=True))
        output.loss.backward()
        assert output.loss.item() == pytest.approx(batch_loss(results), rel=LOSS_TOLERANCE), method
        parameters = dict(peft_model.named_parameters())
        for name, expected in batch_gradients(results).items():
            error = (parameters[name].grad - expected).norm() / expected.norm()
            assert error < GRADIENT_TOLERANCE, f"{method}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_tolerances_are_five_times_the_noise_of_float32(family: str) -> None:
    for method in METHODS:
        for row in ALL_ROWS:
            single, double = (forward_alone(family, method, row, dtype) for dtype in (torch.float32, torch.float64))
            assert logit_error(single.logits, double.logits) < LOGIT_TOLERANCE / 5, method
            assert single.loss_sum == pytest.approx(double.loss_sum, rel=LOSS_TOLERANCE / 5), method
            for name, expected in double.gradients.items():
                error = (single.gradients[name] - expected).norm()
                assert error <= GRADIENT_TOLERANCE / 5 * expected.norm(), f"{method}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_decided_and_peft_generates_it(family: str) -> None:
    """No choice is so close that an exact model could pick another token, and PEFT's cached generation agrees."""
    for method in METHODS:
        for row in ALL_ROWS:
            continuation = greedy_alone(family, method, row)
            assert continuation.margin > 2 * LOGIT_TOLERANCE, method
            assert peft_generate_alone(oracle_model(family, method), method, row) == continuation.tokens, method


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_shows(family: str) -> None:
    """Each method changes the logits of the bare model, and one element of the last virtual token is enough to."""
    row = make_rows((6,))[0]
    with torch.no_grad():
        bare = FAMILIES[family].make()(input_ids=torch.tensor([row.ids])).logits[0]
    for method in METHODS:
        expected = forward_alone(family, method, row).logits
        assert logit_error(bare, expected) > VISIBLE, method
        if method in ("prompt_tuning", "cartridge"):
            peft_model = make_peft(FAMILIES[family], method)
            *_, table = (parameter for parameter in peft_model.parameters() if parameter.requires_grad)
            with torch.no_grad():
                table[-1, 0] += table.std()
                changed = own_logits(method, run_alone(peft_model, method, row.ids, row.task).logits)
            assert logit_error(changed, expected) > 10 * LOGIT_TOLERANCE, method


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_hide_something(family: str) -> None:
    row = make_rows((8,))[0]
    model = FAMILIES[family].make()
    config = FAMILIES[family].config()
    config.sliding_window = config.max_position_embeddings
    unlimited = type(model)(config)
    unlimited.load_state_dict(model.state_dict())
    prompt = prompt_embeddings(family, "prompt_tuning", row)
    logits = run_plain(unlimited.eval(), prompt, row.ids)[NUM_VIRTUAL_TOKENS:]
    assert logit_error(logits, forward_alone(family, "prompt_tuning", row).logits) > VISIBLE


def takes_positions(family: Family) -> bool:
    return family.name not in {"bloom", "mpt", "falcon_alibi"}  # ALiBi: distances, no positions


@pytest.mark.parametrize("family", [name for name in FAMILIES if takes_positions(FAMILIES[name])])
def test_a_position_off_by_one_shows(family: str) -> None:
    """Own tokens one position too far from their prompt, as if a pad token had been counted."""
    row = make_rows((6,))[0]
    model = FAMILIES[family].make()
    prompt = prompt_embeddings(family, "prompt_tuning", row)
    embeddings = torch.cat([prompt, model.get_input_embeddings()(torch.tensor([row.ids]))], dim=1)
    positions = torch.arange(embeddings.shape[1])
    positions[NUM_VIRTUAL_TOKENS:] += 1
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings, position_ids=positions[None]).logits[0, NUM_VIRTUAL_TOKENS:]
    assert logit_error(logits, forward_alone(family, "prompt_tuning", row).logits) > VISIBLE


def test_sinks_and_soft_caps_show() -> None:
    row = make_rows((6,))[0]
    gpt_oss = FAMILIES["gpt_oss"].make()
    with torch.no_grad():
        for layer in gpt_oss.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    gemma2 = FAMILIES["gemma2"].make()
    for layer in gemma2.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    for family, model in (("gpt_oss", gpt_oss), ("gemma2", gemma2)):
        logits = run_plain(model, prompt_embeddings(family, "prompt_tuning", row), row.ids)[NUM_VIRTUAL_TOKENS:]
        assert logit_error(logits, forward_alone(family, "prompt_tuning", row).logits) > VISIBLE, family


def test_batches_hide_random_tokens_behind_the_mask() -> None:
    for case in CASES:
        batch = make_batch(case)
        for row, own, ids in zip(case.rows, batch.slices, batch.input_ids, strict=True):
            assert ids[own].tolist() == list(row.ids)
        if case.padding != "none":
            assert batch.attention_mask is not None
            assert (batch.attention_mask.sum(1) == torch.tensor([len(row) for row in case.rows])).all()
            assert (batch.attention_mask.sum(1) < batch.input_ids.shape[1]).all(), "every row is padded"
            assert (batch.input_ids[batch.attention_mask == 0] > 1).all(), "no pad is the pad token"
            assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
