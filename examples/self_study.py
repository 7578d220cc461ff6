# SPDX-License-Identifier: Apache-2.0
"""Self-study: a long text becomes a cartridge of P virtual tokens that answers as if the text stood in the context.

    python examples/self_study.py docs/design.md -o design_cartridge

The base is its own teacher. With the whole text in its context it continues questions about the text; behind the
cartridge alone it then learns to predict the same, token for token:

    loss = mean over answer tokens of KL( p(. | text, question, answer so far) || p(. | cartridge, ...same) )

The cartridge starts as the keys and values of the text's first P tokens, the first of which stays as it is (it is
where attention rests). The text itself is served as a prefix too: it is run through the model once, and every
question of every batch attends to the one copy. Source: Eyuboglu et al. 2025, "Cartridges: Lightweight and
general-purpose long context representations via self-study".

Reported on conversations that were not trained on, and on the text itself, which was: no context, the untrained
cartridge, the trained one, the full context.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from softprompt_fast import SoftPromptModel
from softprompt_fast.demo import assets
from softprompt_fast.losses import IGNORE
from softprompt_fast.train.data import Example, collate

TEXT, FIRST_TOKENS, CARTRIDGE = "text", "first tokens", "cartridge"
QUESTIONS = (
    'Question: What does the text say about "{}"?\nAnswer:',
    'Explain "{}" in one sentence:',
    'A note on "{}":',
    'Here is what follows from "{}":',
)


@dataclass(frozen=True)
class Score:
    """How well a context stands in for the full text.

    Attributes:
        kl: nats a token, of held-out answers: from the full context's distribution to this one's.
        agreement: share of answer tokens whose likeliest token is the full context's.
        text_perplexity: of the text's own tokens, in excerpts from all over it. They are training text: what the text
            says is meant to be learnt, so no part of it is held out.
        prefix_bytes: keys and values that stay in memory.
    """

    kl: float
    agreement: float
    text_perplexity: float
    prefix_bytes: int


def excerpts(text: Tensor, length: int, count: int, rng: random.Random) -> list[Example]:
    """Random stretches of the text ``[T]``, every token but the first to be predicted."""
    starts = [rng.randrange(max(1, len(text) - length)) for _ in range(count)]
    return [Example(0, text[start : start + length].tolist(), 1) for start in starts]


def conversations(
    model: SoftPromptModel, tokenizer: Any, text: Tensor, new_tokens: int, count: int, rng: random.Random
) -> list[Example]:
    """Questions about random phrases of the text, with answers sampled behind the full text; answers are learnt."""
    questions = []
    for _ in range(count):
        start = rng.randrange(max(1, len(text) - 8))
        phrase = " ".join(tokenizer.decode(text[start : start + 8]).split())
        questions.append(tokenizer(rng.choice(QUESTIONS).format(phrase)).input_ids)
    found = []
    for first in range(0, count, 16):
        part = [Example(0, ids, len(ids)) for ids in questions[first : first + 16]]
        batch = collate(part, tokenizer.pad_token_id)
        rows = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            prompt=TEXT,
            do_sample=True,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = rows[:, batch["input_ids"].shape[1] :].tolist()
        for example, answer in zip(part, answers, strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            found.append(Example(0, example.ids + answer, example.given))
    return found


def predictions(model: SoftPromptModel, batch: dict[str, Tensor], prompt: str | None) -> tuple[Tensor, Tensor]:
    """Logits ``[n, V]`` at the n positions that predict a label, and those labels ``[n]``."""
    wanted = batch["labels"][:, 1:]
    columns = (wanted != IGNORE).any(dim=0).nonzero()[:, 0]
    wanted = wanted[:, columns]
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**given, prompt=prompt, logits_to_keep=columns, use_cache=False).logits
    return logits[wanted != IGNORE].float(), wanted[wanted != IGNORE]


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over n positions of ``KL(teacher || student)``, both logits ``[n, V]``."""
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")


def batches(examples: Sequence[Example], rows: int, rng: random.Random) -> Iterator[list[Example]]:
    """Random batches without end; every example once before any comes again."""
    while True:
        order = rng.sample(list(examples), len(examples))
        yield from (order[first : first + rows] for first in range(0, len(order) - rows + 1, rows))


@torch.no_grad()
def score(
    model: SoftPromptModel,
    prompt: str | None,
    answers: Sequence[Example],
    text: Sequence[Example],
    rows: int,
    pad: int,
) -> Score:
    model.eval()
    kl, same, tokens = 0.0, 0, 0
    for first in range(0, len(answers), rows):
        batch = collate(answers[first : first + rows], pad)
        teacher, student = (predictions(model, batch, name)[0] for name in (TEXT, prompt))
        kl += divergence(teacher, student).item()
        same += int((teacher.argmax(-1) == student.argmax(-1)).sum())
        tokens += len(teacher)
    nll, count = 0.0, 0
    for first in range(0, len(text), rows):
        logits, labels = predictions(model, collate(text[first : first + rows], pad), prompt)
        nll += cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    memory = 0 if prompt is None else model.compile_prompt(prompt).nbytes
    return Score(kl / tokens, same / tokens, math.exp(nll / count), memory)


def self_study(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; what is returned is also written to ``results.json``."""
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    rng, held_out_rng = random.Random(options.seed), random.Random(options.seed + 1)
    base, tokenizer = assets.load_model(options.base)
    model = SoftPromptModel(base).eval()
    text = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    text = text[: options.text_tokens]
    model.add_prompt(TEXT, model.cartridge_from_tokens(text).requires_grad_(False))
    first = model.cartridge_from_tokens(text, num_virtual_tokens=options.num_virtual_tokens)
    model.add_prompt(FIRST_TOKENS, first.requires_grad_(False))
    cartridge = model.cartridge_from_tokens(text, num_virtual_tokens=options.num_virtual_tokens)
    model.add_prompt(CARTRIDGE, cartridge)

    talk = partial(conversations, model, tokenizer, text, options.answer_tokens)
    examples = talk(options.conversations, rng) + excerpts(text, options.excerpt_tokens, options.excerpts, rng)
    held_out = talk(options.held_out, held_out_rng)
    recited = excerpts(text, options.excerpt_tokens, options.held_out, held_out_rng)
    print(f"{len(text)} tokens of text; {len(examples)} conversations and excerpts to learn from", flush=True)
    measure = partial(score, model, answers=held_out, text=recited, rows=options.rows, pad=tokenizer.pad_token_id)
    before = {name: measure(name) for name in (FIRST_TOKENS, TEXT)}
    # No context is what a row of no prompt sees; a row's very first token has nothing to be predicted from.
    scores = {"no context": measure(None), "untrained cartridge (first tokens)": before[FIRST_TOKENS]}

    parameters = [parameter for parameter in cartridge.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1.0) * (1 - step / options.steps)
    )
    losses, training = [], time.perf_counter()
    model.train()
    for step, part in zip(range(1, options.steps + 1), batches(examples, options.rows, rng), strict=False):
        batch = collate(part, tokenizer.pad_token_id)
        with torch.no_grad():
            teacher, _ = predictions(model, batch, TEXT)
        student, _ = predictions(model, batch, CARTRIDGE)
        loss = divergence(teacher, student) / len(teacher)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0:
            print(f"step {step}: KL {losses[-1]:.3f}, {time.perf_counter() - training:.0f} s", flush=True)
    training = time.perf_counter() - training

    scores["trained cartridge"] = measure(CARTRIDGE)
    scores["full context"] = before[TEXT]
    model.save_prompt(CARTRIDGE, options.output / "adapter")
    model.compile_prompt(CARTRIDGE).save_pretrained(options.output / "prefix")
    results = {
        "base": options.base,
        "text": options.text.name,
        "text_tokens": len(text),
        "num_virtual_tokens": cartridge.num_virtual_tokens,
        "steps": options.steps,
        "losses": losses,
        "scores": {name: asdict(found) for name, found in scores.items()},
        "training_seconds": training,
        "seconds": time.perf_counter() - started,
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    picture(results, options.output / "self_study.png")
    return results


def picture(results: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    curve, *bars = figure.subplots(1, 4)
    curve.plot(range(1, len(results["losses"]) + 1), results["losses"], color="#1f77b4")
    curve.set(title="Training loss", xlabel="step", ylabel="KL, nats a token", ylim=(0, None))
    names = [name.replace(" (", "\n(").replace(" c", "\nc") for name in results["scores"]]
    for axes, key, title, number in (
        (bars[0], "kl", "KL to the full context\n(held-out answers)", "%.2f"),
        (bars[1], "text_perplexity", "Perplexity of the text\n(which is trained on)", "%.1f"),
        (bars[2], "prefix_bytes", "Prefix memory (MB)", "%.1f"),
    ):
        values = [found[key] / (1e6 if key == "prefix_bytes" else 1) for found in results["scores"].values()]
        axes.bar_label(axes.bar(names, values, color=["#d0d0d0", "#b0b0b0", "#1f77b4", "#ff7f0e"]), fmt=number)
        axes.set(title=title, ylim=(0, 1.15 * max(values)))
        axes.tick_params(axis="x", labelsize=7)
    figure.suptitle(
        f"{results['text_tokens']} tokens of {results['text']} as {results['num_virtual_tokens']} virtual tokens, "
        f"{results['steps']} steps in {results['training_seconds']:.0f} s"
    )
    figure.savefig(path, dpi=120)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("-o", "--output", type=Path, default=Path("self_study"), help="folder for all results")
    parser.add_argument("--base", default=assets.DEMO_MODEL, help="a folder, a hub name, or 'demo'")
    parser.add_argument("--text-tokens", type=int, default=2048, help="tokens of the text, from its start")
    parser.add_argument("-P", "--num-virtual-tokens", type=int, default=128)
    parser.add_argument("--conversations", type=int, default=96, help="to learn from")
    parser.add_argument("--excerpts", type=int, default=96, help="of the text, to learn from as well")
    parser.add_argument("--held-out", type=int, default=32, help="conversations, and excerpts, to measure on")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--excerpt-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="rows a batch")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    results = self_study(options)
    print(f"{'':36}{'KL':>8}{'agreement':>11}{'perplexity':>12}{'prefix MB':>11}")
    for name, found in results["scores"].items():
        print(
            f"{name:36}{found['kl']:8.3f}{found['agreement']:11.3f}{found['text_perplexity']:12.2f}"
            f"{found['prefix_bytes'] / 1e6:11.2f}"
        )
    print("KL and agreement: of answers not trained on. Perplexity: of the text itself, which was.")
    print(f"{results['seconds']:.0f} s; adapter, prefix, results.json and self_study.png are in {options.output}")


if __name__ == "__main__":
    main()
