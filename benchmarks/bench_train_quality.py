# SPDX-License-Identifier: Apache-2.0
"""Whether training here learns what training with PEFT learns: accuracy by step and by seconds, over several seeds.

    python benchmarks/bench_train_quality.py --json benchmarks/results/cpu-2core-train-quality.json
    python benchmarks/bench_train_quality.py --method PREFIX_TUNING --learning-rate 0.01 --json prefix.json

The task is the demo's: is a movie review positive? For each seed one soft prompt is trained by PEFT and one by this
package, from the same initial values, on the same batches, each with an Adam of its own. They take turns step by step
in one process, so that a slow minute of the machine is slow for both; only the steps are timed.

Rows are padded right: there transformers counts positions from a row's first token, which is exact, while padding on
the left would shift PEFT's. Both prompts' accuracy is measured by this package, which is several times as fast. Before
it counts, PEFT's own logits of some of the reviews are compared; if they differ there is no result.

Beside the JSON file, a plot of the same name ends in .png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _bases import make_base
from _harness import ratio, shown, write_json
from _training import METHODS, OURS, PEFT, Trainee
from torch import Tensor

from softprompt_fast.demo import sentiment
from softprompt_fast.demo.assets import DEMO_MODEL, Review, load_demo_model, load_reviews
from softprompt_fast.integrations.peft import from_peft_model

TOLERANCE = 1e-4
"""Of a logit, relative to the largest: rounding explains a tenth of it after 30 layers."""


@dataclass(frozen=True)
class Settings:
    """What is trained and measured; the defaults take about ten minutes on two cores."""

    method: str = "PROMPT_TUNING"
    virtual_tokens: int = 20
    rows: int = 16
    steps: int = 40
    learning_rate: float = 0.02
    seeds: int = 3
    eval_every: int = 10
    held_out: int = 256
    checked: int = 64


class Run:
    """One prompt's training from ``seed``'s initial values: losses, seconds and accuracies so far."""

    def __init__(self, trainee: Trainee, settings: Settings, seed: int) -> None:
        self.trainee, self.settings, self.seed = trainee, settings, seed
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        _initialise(trainee, settings.method, seed)
        self.optimizer = torch.optim.Adam(trainee.parameters, lr=settings.learning_rate)
        self.schedule = sentiment.warm_up_and_decay(self.optimizer, settings.steps)

    def step(self, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.trainee.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step_seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())

    def evaluated(self, accuracy: float) -> None:
        self.evaluations.append({"step": len(self.losses), "seconds": sum(self.step_seconds), "accuracy": accuracy})

    def as_dict(self) -> dict[str, Any]:
        columns = {name: [e[name] for e in self.evaluations] for name in ("step", "seconds", "accuracy")}
        return {"seed": self.seed, **columns, "losses": self.losses, "step_seconds": self.step_seconds}


def _initialise(trainee: Trainee, method: str, seed: int) -> None:
    """Virtual tokens as large as the base's embeddings (PEFT's own start is seven times as large here, and slow to
    come back from); prefixes of order one, as PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0
    if method == "PROMPT_TUNING":
        scale = trainee.model.get_input_embeddings().weight.std().item()
    with torch.no_grad():
        for parameter in trainee.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def pad_right(ids: Tensor, mask: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """``[B, S]`` tensors of rows that are padded left, with the padding moved behind each row."""
    order = (1 - mask).argsort(dim=1, stable=True)
    return tuple(t.gather(1, order) for t in (ids, mask, *more))


@torch.no_grad()
def difference(peft_model: Any, ours: Any, task: sentiment.Task, reviews: Sequence[Review], rows: int) -> float:
    """Largest difference between the models' logits of the labels behind one prompt, relative to the largest logit."""
    worst = largest = 0.0
    peft_model.eval()
    for start in range(0, len(reviews), rows):
        batch = reviews[start : start + rows]
        ids, mask = pad_right(*task.encode(batch))
        logits = peft_model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]  # without virtual tokens
        expected = logits[torch.arange(len(batch)), mask.sum(1) - 1][:, task.label_ids]
        found = sentiment.label_logits(ours, task, batch, PEFT)
        worst = max(worst, (found - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    peft_model.train()
    return worst / largest


def measure(bases: tuple[Any, Any], tokenizer: Any, reviews: Sequence[Review], settings: Settings) -> dict[str, Any]:
    """Train with both systems, each over one of two equal ``bases``, for every seed.

    Raises:
        RuntimeError: PEFT's own logits are not those by which its prompt was evaluated.
    """
    task = sentiment.Task(tokenizer)
    trainees = {
        system: Trainee.over(system, base, settings.method, settings.virtual_tokens)
        for system, base in zip((PEFT, OURS), bases, strict=True)
    }
    ours = trainees[OURS].model
    # Over the tensors that PEFT trains, so that this package can evaluate them as they are.
    ours.add_prompt(PEFT, from_peft_model(trainees[PEFT].model))
    learnt, unseen = sentiment.for_training(reviews), [r for r in reviews if r.held_out][: settings.held_out]
    curves: dict[str, list[dict[str, Any]]] = {PEFT: [], OURS: []}
    logits = []
    for seed in range(settings.seeds):
        runs = {system: Run(trainee, settings, seed) for system, trainee in trainees.items()}

        def evaluate(runs: dict[str, Run] = runs) -> None:
            for system, run in runs.items():
                prompt = PEFT if system == PEFT else "default"
                run.evaluated(sentiment.accuracy(ours, task, unseen, prompt, lambda: None))
                print(f"seed {run.seed}: {system} {run.evaluations[-1]}", file=sys.stderr, flush=True)
            ours.train()

        batches = islice(sentiment.training_batches(learnt, settings.rows, seed), settings.steps)
        for number, batch in enumerate(batches):
            if number % settings.eval_every == 0:
                evaluate()
            inputs = pad_right(*task.encode_for_training(batch))
            for run in runs.values():
                run.step(*inputs)
        evaluate()
        logits.append(difference(trainees[PEFT].model, ours.eval(), task, unseen[: settings.checked], settings.rows))
        ours.train()
        if not logits[-1] <= TOLERANCE:
            raise RuntimeError(f"PEFT's own logits differ by {logits[-1]:.1e} of the largest, tolerance {TOLERANCE}")
        for system, run in runs.items():
            curves[system].append(run.as_dict())
    return {"curves": curves, "comparison": compare(curves, len(unseen)), "logits": logits}


def compare(curves: dict[str, list[dict[str, Any]]], held_out: int) -> dict[str, Any]:
    """The systems' curves beside each other, and what they may differ by: the spread of the seeds."""
    accuracies = {system: [run["accuracy"] for run in runs] for system, runs in curves.items()}  # [seed][evaluation]
    means = {
        system: [statistics.mean(column) for column in zip(*rows, strict=True)] for system, rows in accuracies.items()
    }
    by_seed = [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in zip(*accuracies.values(), strict=True)]
    spreads = [max(column) - min(column) for rows in accuracies.values() for column in zip(*rows, strict=True)]
    losses = [[run["losses"] for run in runs] for runs in curves.values()]
    share = statistics.mean(means[OURS][-1:] + means[PEFT][-1:])
    return {
        "largest_difference": max(map(max, by_seed)),
        "largest_difference_of_means": max(abs(a - b) for a, b in zip(*means.values(), strict=True)),
        "difference_of_means_at_the_end": abs(means[OURS][-1] - means[PEFT][-1]),
        "largest_spread_of_seeds": max(spreads),
        "standard_error": math.sqrt(share * (1 - share) / held_out),
        # Of each step, the largest over the seeds, relative.
        "loss_differences": [
            max(abs(a - b) / b for a, b in zip(*step, strict=True))
            for step in zip(zip(*losses[1], strict=True), zip(*losses[0], strict=True), strict=True)
        ],
        "speed": ratio(
            [s for run in curves[PEFT] for s in run["step_seconds"]],
            [s for run in curves[OURS] for s in run["step_seconds"]],
        ),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy by step and by seconds: the mean of the seeds, and a band from the lowest to the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape, comparison = result["shape"], result["comparison"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    looks = {PEFT: ("#d95f02", "-", "PEFT"), OURS: ("#1f77b4", "--", "softprompt_fast")}
    for system, (color, line, label) in looks.items():
        runs = result["curves"][system]
        columns = list(zip(*(run["accuracy"] for run in runs), strict=True))
        seconds = [statistics.mean(column) for column in zip(*(run["seconds"] for run in runs), strict=True)]
        for axes, x in ((left, runs[0]["step"]), (right, seconds)):
            axes.plot(x, [statistics.mean(c) for c in columns], color=color, linestyle=line, marker="o", label=label)
            axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15)
    left.set(xlabel="step", ylabel=f"accuracy on {shape['held_out']} held-out reviews")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", title=f"mean and range of {shape['seeds']} seeds")
    figure.suptitle(
        f"{METHODS[shape['method']].capitalize()}, P {shape['virtual_tokens']}, {shape['rows']} rows a step: "
        f"the curves differ by at most {comparison['largest_difference_of_means']:.3f}, seeds by up to "
        f"{comparison['largest_spread_of_seeds']:.3f}; a step is {comparison['speed']['median']:.1f}x as fast"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--method", choices=["PROMPT_TUNING", "PREFIX_TUNING"], default=defaults.method)
    for name, value in asdict(defaults).items():
        if name != "method":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--json", type=Path, help="write curves and the setting here, and the plot beside it")
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(defaults)})
    _, tokenizer = load_demo_model()
    bases = tuple(make_base(DEMO_MODEL, torch.device("cpu"), torch.float32) for _ in range(2))
    result = {"shape": asdict(settings), **measure(bases, tokenizer, load_reviews(), settings)}
    found = result["comparison"]
    print(f"largest difference of the systems: {found['largest_difference']:.4f} for one seed, ", end="")
    print(f"{found['largest_difference_of_means']:.4f} of the means")
    print(f"largest spread of the seeds: {found['largest_spread_of_seeds']:.4f}; ", end="")
    print(f"standard error of one accuracy: {found['standard_error']:.4f}")
    print(f"losses differ by {found['loss_differences'][0]:.1e} at the first step, ", end="")
    print(f"at most by {max(found['loss_differences']):.1e}")
    print(f"a step is faster by {shown(found['speed'])}")
    if args.json:
        write_json(args.json, result)
        plot(result, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
