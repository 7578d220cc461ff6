# SPDX-License-Identifier: Apache-2.0
"""The commands. Each one only reads its arguments, calls the package and prints: nothing is computed here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_fast._version import __version__
from softprompt_fast.cli._session import EXIT_CODES, Session, session
from softprompt_fast.cli.bench import bench
from softprompt_fast.cli.serve import serve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    help=f"Serve and train PEFT soft prompts with one shared prefix.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command(epilog=EXIT_CODES)(serve)
app.command(epilog=EXIT_CODES)(bench)

NO_PROMPT = "none"
#: Parts of the help of `train`.
ROWS, PROMPT, STEPS, RUN = "Rows", "Prompt", "Steps", "Checkpoints and logs"
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
Base = Annotated[str, typer.Option("--base", help="Base model: a folder, a hub name, or 'demo' for the bundled one.")]
Dtype = Annotated[str, typer.Option(help="Data type of the base model: float32, bfloat16 or float16.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"softprompt-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the adapter, the prefix, the numbers and the picture.")
    ] = Path("softprompt_fast_demo"),
    base: Base = "demo",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out reviews for the accuracies.")] = 384,
    seed: Annotated[int, typer.Option(help="Seed of the prompt's start and of the batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a soft prompt for sentiment on real reviews, save it, load it in PEFT and here, compare and time."""
    with session(as_json) as run:
        from softprompt_fast.demo import run as demo_run

        settings = demo_run.Settings(base=base, steps=steps, held_out=held_out, seed=seed)
        result = demo_run.run(output, settings, run.console)
        run.finish(result.to_dict())


@app.command("compile", epilog=EXIT_CODES)
def compile_(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory of a soft prompt.")],
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the prefix to.")],
    task: Annotated[int | None, typer.Option(help="Task of a multitask prompt, from 0.")] = None,
    dtype: Dtype = "float32",
    as_int8: Annotated[
        bool, typer.Option("--int8", help="Keep keys and values in int8: a quarter of float32's memory.")
    ] = False,
    as_fp8: Annotated[bool, typer.Option("--fp8", help="The same in float8 (e4m3), for GPUs that have it.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a soft prompt into its prefix: the keys and values that every row will share."""
    with session(as_json) as run:
        import torch

        from softprompt_fast import SoftPromptModel

        if as_int8 and as_fp8:
            raise typer.BadParameter("expected one of the two", param_hint="--int8, --fp8")
        _check_exists(adapter)
        base_model, _ = _load_base(base, dtype, run)
        model = SoftPromptModel.from_pretrained(base_model, adapter, prompt_name="adapter")
        with run.console.status("computing keys and values"):
            prefix = model.compile_prompt("adapter", task=task)
            if as_int8 or as_fp8:
                prefix = prefix.quantize(dtype=torch.int8 if as_int8 else torch.float8_e4m3fn)
        prefix.save_pretrained(output)
        result = {
            "output": str(output),
            "method": prefix.method,
            "num_virtual_tokens": prefix.num_virtual_tokens,
            "num_layers": len(prefix.keys),
            "dtype": str(prefix.keys[0].dtype).removeprefix("torch."),
            "bytes": prefix.nbytes,
            "sha256": prefix.digest,
        }
        if prefix.quantization is not None:
            result["quantization"] = prefix.quantization
        run.finish(result)
        run.say(
            f"{output}: {prefix.method}, {prefix.num_virtual_tokens} virtual tokens, {len(prefix.keys)} layers,"
            f" {result['dtype']}, {prefix.nbytes / 1e6:.2f} MB whatever the batch"
        )
        if (facts := prefix.quantization) is not None:
            worst = {name: max(facts[name]) for name in ("key_error", "value_error", "output_error")}
            run.say(
                f"{result['dtype']} error (relative, worst layer): keys {worst['key_error']:.2%}, values"
                f" {worst['value_error']:.2%}, attention of random queries {worst['output_error']:.2%}"
            )


@app.command(epilog=EXIT_CODES)
def generate(
    texts: Annotated[list[str], typer.Argument(help="Texts to continue; they run as one batch.")],
    base: Base,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="NAME=DIR of a PEFT adapter or a compiled prefix. May be given several times."),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-name",
            help=f"Prompt to use: once for all texts, or once per text; '{NO_PROMPT}' is the bare model. "
            "May be left out when only one prompt is given.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each text at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Continue texts behind soft prompts, a prompt per text if wanted."""
    folders = dict(_name_and_folder(prompt) for prompt in prompts or [])
    if len(folders) != len(prompts or []):
        raise typer.BadParameter("every name may be given once", param_hint="--prompt")
    chosen = _prompt_per_text(names or [], list(folders), len(texts))
    with session(as_json) as run:
        import torch

        from softprompt_fast import SoftPromptModel

        for folder in folders.values():
            _check_exists(folder)
        base_model, tokenizer = _load_base(base, dtype, run)
        model = SoftPromptModel(base_model)
        for name, folder in folders.items():
            model.load_prompt(name, folder)
        tokenizer.padding_side = "left"
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        started = time.perf_counter()
        with run.console.status(f"generating for {len(texts)} text(s)"):
            output = model.generate(
                **batch,
                prompt=chosen,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        seconds = time.perf_counter() - started
        continuations = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rows = [
            {"prompt": name, "text": text, "continuation": continuation}
            for name, text, continuation in zip(chosen, texts, continuations, strict=True)
        ]
        run.finish({"results": rows, "seconds": seconds})
        if not as_json:
            for row in rows:
                typer.secho(f"[{row['prompt'] or NO_PROMPT}] {row['text']}", bold=True, nl=False)
                typer.echo(row["continuation"])


@app.command(epilog=EXIT_CODES)
def train(
    data: Annotated[str, typer.Argument(help="Rows: a .jsonl or .csv file, or a dataset of the Hugging Face hub.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, adapter, prefix, report and TensorBoard.")
    ],
    base: Base = "demo",
    input_column: Annotated[
        str | None,
        typer.Option(
            help="Column with no loss on it. Left out: prompt, or none where there is 'text'.", rich_help_panel=ROWS
        ),
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="Column that is learnt. Left out: completion, or text.", rich_help_panel=ROWS)
    ] = None,
    task_column: Annotated[
        str | None, typer.Option(help="Column with a number, the task of a multitask prompt.", rich_help_panel=ROWS)
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset.", rich_help_panel=ROWS)] = "train",
    validation: Annotated[
        str,
        typer.Option(
            help="Held-out rows: a file or hub dataset, or a share of the rows; 0 holds out none.",
            rich_help_panel=ROWS,
        ),
    ] = "0.1",
    method: Annotated[
        str,
        typer.Option(
            help="PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, PREFIX_TUNING, CARTRIDGE or CPT.",
            rich_help_panel=PROMPT,
        ),
    ] = "PROMPT_TUNING",
    num_virtual_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-virtual-tokens",
            "-P",
            min=1,
            help="Virtual tokens; 20, or what --init says.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="Start: random (for prompt tuning at the scale of the base's embeddings, which learns faster than "
            "PEFT's), normal (PEFT's), vocab, text:WORDS, examples:N (CPT's context), prompt:DIR (go on from an "
            "adapter, or from saved keys and values).",
            rich_help_panel=PROMPT,
        ),
    ] = "random",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="NAME=VALUE of the method's PEFT configuration. May be given several times.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of AdamW. Left out: the method's, 0.02 for prompt tuning.", rich_help_panel=STEPS),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="linear, cosine, constant, constant_with_warmup, polynomial or inverse_sqrt.", rich_help_panel=STEPS
        ),
    ] = "linear",
    warmup: Annotated[
        float, typer.Option(min=0.0, help="Steps (from 1), or share of all steps (below 1).", rich_help_panel=STEPS)
    ] = 0.03,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, in place of --epochs.", rich_help_panel=STEPS)
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the rows.", rich_help_panel=STEPS)] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.", rich_help_panel=STEPS)] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches an optimizer step.", rich_help_panel=STEPS)] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Own tokens a row; 512, or what the base's positions leave.", rich_help_panel=ROWS),
    ] = None,
    too_long: Annotated[
        str, typer.Option(help="What becomes of longer rows: cut, drop or refuse.", rich_help_panel=ROWS)
    ] = "cut",
    end_of_text: Annotated[
        bool, typer.Option("--eos/--no-eos", help="Close targets with the end-of-text token.", rich_help_panel=ROWS)
    ] = True,
    dtype: Dtype = "float32",
    seed: Annotated[
        int,
        typer.Option(help="Seed of the start, of the held-out share and of the rows' order.", rich_help_panel=STEPS),
    ] = 0,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between evaluations, each of which is a checkpoint. Left out: a tenth of the run.",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints. Left out: a tenth of the run.", rich_help_panel=RUN),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after so many evaluations in a row without a better loss.", rich_help_panel=RUN
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Recompute activations: less memory, more time.", rich_help_panel=STEPS),
    ] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard logs.", rich_help_panel=RUN)] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest whole checkpoint in the output folder.", rich_help_panel=RUN
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a soft prompt on a dataset, with checkpoints that survive a kill, and report how it went."""
    chosen = {"--method": method.upper().replace("-", "_"), "--schedule": schedule, "--too-long": too_long}
    with session(as_json, extra="train") as run:
        from softprompt_fast.prompt import METHODS
        from softprompt_fast.train import check_packages
        from softprompt_fast.train import data as rows

        known = {"--method": METHODS, "--schedule": SCHEDULES, "--too-long": rows.TOO_LONG}
        for name, value in chosen.items():
            if value not in known[name]:
                raise typer.BadParameter(f"expected {', '.join(known[name])}, found {value!r}", param_hint=name)
        _check_dtype(dtype)
        if steps is None and epochs <= 0:
            raise typer.BadParameter("expected more than 0", param_hint="--epochs")
        check_packages(tensorboard)
        from softprompt_fast.train import run as training

        settings = training.Settings(
            data=data,
            base=base,
            validation=validation,
            columns=rows.Columns(input_column, target_column, task_column),
            split=split,
            method=chosen["--method"],
            num_virtual_tokens=num_virtual_tokens,
            init=init,
            options=dict(_name_and_value(option) for option in options or []),
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            max_length=max_length,
            too_long=too_long,
            end_of_text=end_of_text,
            dtype=dtype,
            seed=seed,
            eval_every=eval_every,
            save_every=save_every,
            patience=patience,
            checkpointing=checkpointing,
            tensorboard=tensorboard,
        )
        run.finish(training.run(output, settings, run.console, resume=resume))


@app.command(epilog=EXIT_CODES)
def tune(
    ops: Annotated[list[str] | None, typer.Option("--op", help="Op to tune, may be given several times; all.")] = None,
    kernels: Annotated[
        list[str] | None, typer.Option("--kernel", help="Kernel of it, may be given several times; all.")
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", help="Key such as d128-16bit, may be given several times; all of the kernels'."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the tables. Left out: where they are looked for, SOFTPROMPT_FAST_TUNED or else "
            "softprompt_fast/tuned in the user's configuration folder.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the Triton kernels' block sizes on this GPU and write what is faster than what ships."""
    with session(as_json) as run:
        from softprompt_fast import tune as tuning

        run.finish(tuning.run(ops or [], kernels or [], keys or [], output, run.say))


@app.command(epilog=EXIT_CODES)
def info(as_json: Json = False) -> None:
    """Show what is installed and built, and which backend serves which op here or why it doesn't."""
    with session(as_json) as run:
        from softprompt_fast import info as facts

        found = facts.collect()
        run.finish(found)
        if not as_json:
            _print_info(found)


def _print_info(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table(show_header=False, box=None)
    about.add_row("softprompt-fast", found["version"])
    about.add_row("python", f"{found['python']} on {found['platform']}")
    for package, version in found["packages"].items():
        about.add_row(package, version or "not installed")
    torch = found["torch"]
    about.add_row("torch build", f"CUDA {torch['cuda'] or 'none'}, CPU capability {torch['cpu_capability']}")
    about.add_row("devices", ", ".join(torch["devices"]) or f"CPU only, {torch['threads']} thread(s)")
    build = found["extension"]["build"]
    about.add_row("extension", found["extension"]["reason"] + (f", {build['compiler']}" if build else ""))
    about.add_row("CPU kernels", found["extension"]["cpu_isa"] or "none without the extension")
    usable = [name for name, here in found["cpu_features"].items() if here]
    about.add_row("CPU features", " ".join(usable) or "unknown without the extension")
    cuda = found["cuda"]["build"]
    about.add_row("CUDA kernels", f"for {cuda['architectures']}" if cuda else found["cuda"]["reason"])
    about.add_row("Triton kernels", found["triton"]["reason"])
    for op, path in found["triton"]["tables"].items():
        about.add_row("", f"{op}: block sizes of {path}")
    about.add_row("backend asked for", found["backend"] or "auto")
    console.print(about)

    ops = Table("op", "backend", "serves it here")
    for op, backends in found["ops"].items():
        for i, (backend, reasons) in enumerate(backends.items()):
            ops.add_row(op if i == 0 else "", backend, "yes" if not reasons else f"no: {'; '.join(reasons)}")
    console.print(ops)


def _load_base(name: str, dtype: str, run: Session) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from softprompt_fast.demo import assets

    _check_dtype(dtype)
    with run.console.status(f"loading {name}"):
        model, tokenizer = assets.load_model(name, say=run.say)
        return model.to(getattr(torch, dtype)), tokenizer


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16 or float16, found {dtype!r}", param_hint="--dtype")


def _name_and_value(option: str) -> tuple[str, Any]:
    """``NAME=VALUE``; the value as JSON where it is some (128, true, [1, 2]), else as text."""
    name, equals, value = option.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"expected NAME=VALUE, found {option!r}", param_hint="--option")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _check_exists(folder: Path) -> None:
    """Before the base model is loaded, and naming the folder rather than the first file that should be in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")


def _name_and_folder(prompt: str) -> tuple[str, Path]:
    name, equals, folder = prompt.partition("=")
    if not (name and equals and folder) or name == NO_PROMPT:
        raise typer.BadParameter(
            f"expected NAME=DIR with a NAME other than {NO_PROMPT!r}, found {prompt!r}", param_hint="--prompt"
        )
    return name, Path(folder)


def _prompt_per_text(names: list[str], known: list[str], texts: int) -> list[str | None]:
    """The prompt of every text, from the names given on the command line."""
    if not names:
        if len(known) > 1:
            raise typer.BadParameter(
                f"several prompts are given: say which ({', '.join(known)})", param_hint="--prompt-name"
            )
        names = known or [NO_PROMPT]
    if len(names) == 1:
        names = names * texts
    if len(names) != texts:
        raise typer.BadParameter(
            f"expected 1 or {texts} (one per text), found {len(names)}", param_hint="--prompt-name"
        )
    if unknown := sorted(set(names) - set(known) - {NO_PROMPT}):
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known: {', '.join([*known, NO_PROMPT])}", param_hint="--prompt-name"
        )
    return [None if name == NO_PROMPT else name for name in names]
