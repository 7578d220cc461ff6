# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end: train, save, load in PEFT and here, compare, time, draw."""

from __future__ import annotations

import json
import random
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from softprompt_fast._io import atomic_write_bytes, make_directory
from softprompt_fast.demo import assets, compare, report, sentiment
from softprompt_fast.demo.sentiment import PROMPT_NAME
from softprompt_fast.model import SoftPromptModel


@dataclass(frozen=True)
class Settings:
    """What the demo does; the defaults take under six minutes on two cores."""

    base: str = assets.DEMO_MODEL
    num_virtual_tokens: int = 20
    longer_prompt: int = 256  # virtual tokens of the second timing
    steps: int = 60
    rows: int = 16
    learning_rate: float = 0.02
    held_out: int = 384
    compared: int = 128
    rows_timed: int = 16
    own_tokens_timed: int = 24
    new_tokens_timed: int = 16
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What came out: accuracies are shares, losses nats, times seconds, memory bytes."""

    base: str
    num_virtual_tokens: int
    held_out: int
    accuracy_bare: float
    accuracy_before: float
    accuracy_after: float
    losses: list[float]
    agreement: compare.Agreement
    timings: list[compare.Timing]
    rows_timed: int
    own_tokens_timed: int
    new_tokens_timed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(output: Path, settings: Settings, console: Console) -> Result:
    """Run the demo and leave ``adapter/``, ``prefix/``, ``results.json`` and ``demo.png`` in ``output``.

    Args:
        output: folder to write to, made if need be.
        settings: see :class:`Settings`.
        console: gets the progress bars and the tables.

    Raises:
        OSError: the model or the text can't be fetched, or ``output`` can't be written.
        ModuleNotFoundError: a package of the extra ``demo`` (gguf, matplotlib, peft) is missing.
    """
    import matplotlib  # noqa: F401  fail now, not after minutes of training
    import peft

    started = time.perf_counter()
    output = make_directory(output)
    reviews = assets.load_reviews(console.print)
    base, tokenizer = assets.load_model(settings.base, console.print)
    task = sentiment.Task(tokenizer)
    held_out = [review for review in reviews if review.held_out]
    held_out = random.Random(settings.seed).sample(held_out, k=min(settings.held_out, len(held_out)))

    model = SoftPromptModel(base)
    prompt = sentiment.fresh_prompt(base, settings.num_virtual_tokens, settings.seed)
    model.add_prompt(PROMPT_NAME, prompt)

    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with warnings.catch_warnings(), Progress(*columns, console=console) as progress:
        # PEFT and transformers warn about each other's arguments: no news for whoever watches the bars.
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")

        def bar(what: str, total: int):
            row = progress.add_task(what, total=total)
            return lambda: progress.advance(row)

        batches = -(-len(held_out) // 32)
        bare = sentiment.accuracy(model, task, held_out, None, bar("accuracy without a prompt", batches))
        before = sentiment.accuracy(model, task, held_out, PROMPT_NAME, bar("accuracy with a random prompt", batches))

        row = progress.add_task("training", total=settings.steps)
        losses = sentiment.train(
            model,
            prompt,
            task,
            sentiment.for_training(reviews),
            steps=settings.steps,
            rows=settings.rows,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            advance=lambda loss: progress.update(row, advance=1, description=f"training (loss {loss:.3f})"),
        )
        after = sentiment.accuracy(model, task, held_out, PROMPT_NAME, bar("accuracy after training", batches))

        adapter = output / "adapter"
        model.save_prompt(PROMPT_NAME, adapter)
        model.compile_prompt(PROMPT_NAME).save_pretrained(output / "prefix")

        # Both sides start again from what is on disk, each with a base model of its own.
        model = SoftPromptModel.from_pretrained(base, adapter, prompt_name=PROMPT_NAME)
        peft_base, _ = assets.load_model(settings.base, console.print)
        peft_model = peft.PeftModel.from_pretrained(peft_base, adapter).eval()
        compared = held_out[: settings.compared]
        agreement = compare.agreement(model, peft_model, task, compared, bar("PEFT, a row at a time", len(compared)))

        timed = _equal_length_rows(task, held_out, settings)
        advance = bar("timing three systems", 2 * 3 * (settings.rounds + 1))
        options = {"new_tokens": settings.new_tokens_timed, "rounds": settings.rounds, "advance": advance}
        timings = compare.timings(model, peft_model, PROMPT_NAME, timed, **options)
        # Twenty virtual tokens are little work for anyone; what a long prompt costs needs no training to be timed.
        model.add_prompt("longer", sentiment.fresh_prompt(base, settings.longer_prompt, settings.seed))
        with tempfile.TemporaryDirectory() as folder:
            model.save_prompt("longer", folder)
            peft_model.load_adapter(folder, "longer")
        peft_model.set_adapter("longer")
        timings += compare.timings(model, peft_model, "longer", timed, **options)

    result = Result(
        base=settings.base,
        num_virtual_tokens=settings.num_virtual_tokens,
        held_out=len(held_out),
        accuracy_bare=bare,
        accuracy_before=before,
        accuracy_after=after,
        losses=losses,
        agreement=agreement,
        timings=timings,
        rows_timed=timed.shape[0],
        own_tokens_timed=timed.shape[1],
        new_tokens_timed=settings.new_tokens_timed,
        seconds=time.perf_counter() - started,
    )
    atomic_write_bytes(output / "results.json", json.dumps(result.to_dict(), indent=2).encode())
    report.picture(result, output / "demo.png")
    for table in report.tables(result):
        console.print(table)
    console.print(
        f"{result.seconds:.0f} s; adapter, prefix, results.json and demo.png are in {output}", soft_wrap=True
    )
    return result


def _equal_length_rows(task: sentiment.Task, reviews: list[assets.Review], settings: Settings) -> torch.Tensor:
    """The first tokens of real reviews, int64 ``[B, S]`` with no padding: PEFT's padded batches differ from its rows
    alone, and the comparison is of speed."""
    length = settings.own_tokens_timed
    rows = (task.tokenizer(sentiment.TEMPLATE.format(review.text)).input_ids for review in reviews)
    return torch.tensor([row[:length] for row in rows if len(row) >= length][: settings.rows_timed])
