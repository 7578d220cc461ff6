# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast bench``: the arguments and what is printed. The suite itself is ``benchmarks/_suite.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from softprompt_fast.cli._session import Exit, Session, session

GUARD = "Against another revision"  # a part of the help
OTHERS = "--compare, --plot, --report"
PACKAGE = Path(__file__).resolve().parents[1]


def bench(
    sets: Annotated[
        list[str] | None, typer.Argument(metavar="[op|model|train|serve|scaling]...", help="Sets; all of them.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="A choice of cases in ten minutes, or all of them in about an hour.")
    ] = True,
    compare: Annotated[
        str | None, typer.Option(help="Systems, with commas; this package is always among them. Left out: all.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Id of a row, the beginning of one, or a glob. May be given several times."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the rows, samples included; written after every case."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for the plots (SVG).")] = None,
    report: Annotated[Path | None, typer.Option(help="File for the report (Markdown).")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print what would run, and run nothing.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            help="Time this tree, uncommitted changes included, against another revision of it. Both are built first.",
            rich_help_panel=GUARD,
        ),
    ] = None,
    fail: Annotated[
        bool,
        typer.Option(
            "--fail",
            help="Exit with 1 where a row is slower beyond noise, fails, or has another result.",
            rich_help_panel=GUARD,
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Environment variable of this tree alone: with --against HEAD, what a setting does. "
            "May be given several times.",
            rich_help_panel=GUARD,
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=6, help="Rounds of every row; left out: by its length.", rich_help_panel=GUARD)
    ] = None,
) -> None:
    """Time this package against the systems that one would use instead, after checking that all give the same results.

    Runs in a checkout (``pip install -e '.[bench]'``). The tests of what is measured run first; where one fails, or
    results do not agree, times are printed without a speed-up and the exit code is 1.

    With ``--against REV`` this package alone is timed, as it is here and as it was there, taking turns; a row is
    called slower or faster only beyond this machine's noise, which is measured in the same rounds and shown beside.
    """
    if against is None and (fail or settings or rounds):
        raise typer.BadParameter("these need --against", param_hint="--fail, --set, --rounds")
    if against is not None and (compare is not None or plot is not None or report is not None):
        raise typer.BadParameter("not with --against, which times this package alone", param_hint=OTHERS)
    environment = dict(_name_and_value(text) for text in settings or [])
    with session(False, extra="bench") as run:
        suite = load_suite()
        systems = [name.strip() for name in compare.split(",")] if compare is not None else []
        chosen = suite.select(suite.cases(), sets=sets or (), only=only or (), compare=systems, quick=quick)
        if list_:
            for case, names in chosen:
                typer.echo(f"{case.id}  {', '.join(name for name in case.systems if name in names)}")
            return
        if against is not None:
            given = {"environment": environment, "quick": quick, "rounds": rounds}
            regressed = _guard(run, against, [case for case, _ in chosen], json_file, **given)
            if fail and regressed:
                raise typer.Exit(Exit.UNEXPECTED)
            return
        runner = import_module("_run")
        seconds, unknown = runner.expected(chosen, import_module("_results").load(), quick)
        without = f"; {unknown} systems have none there" if unknown else ""
        run.say(f"turns of about {seconds / 60:.0f} minutes in all, by the times in benchmarks/results{without}")
        keep = {} if json_file is None else {"known": lambda outcome: outcome.write(json_file)}
        with _progress(run) as begin:
            outcome = runner.run(chosen, quick=quick, begin=begin, **keep)
        for table in runner.tables(outcome):
            import_module("_harness").show(table)
        _write(outcome, json_file, plot, report, run)
        for name, said in outcome.tests.items():
            if said:
                run.say(f"NO SPEED-UP where {name} is used, its tests are red: {said}")
        run.say(f"{len(outcome.rows)} rows in {outcome.seconds:.0f} s")
    if not outcome.well:
        raise typer.Exit(Exit.UNEXPECTED)


def load_suite() -> ModuleType:
    """``benchmarks/_suite.py`` of the checkout that this package lies in, else of the working directory.

    Raises:
        FileNotFoundError: there is none.
    """
    for root in (PACKAGE.parent, Path.cwd()):
        folder = root / "benchmarks"
        if (folder / "_suite.py").is_file():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return import_module("_suite")
    raise FileNotFoundError(
        "no checkout here: a benchmark runs the package's own tests first and says which commit it measured, and an "
        "installed package holds neither; run it in a clone of the repository, after pip install -e '.[bench]'"
    )


def _guard(run: Session, revision: str, cases: list[Any], json_file: Path | None, **given: Any) -> bool:
    """Whether this tree is worse than the revision."""
    guard = import_module("_guard")
    with _progress(run) as begin:
        found = guard.run(revision, cases, begin=begin, **given)
    import_module("_harness").show(found.table())
    if json_file is not None:
        found.write(json_file)
        run.say(f"rows: {json_file}")
    run.say(found.summary())
    return bool(found.regressed)


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"expected NAME=VALUE, found {text!r}", param_hint="--set")
    return name, value


@contextmanager
def _progress(run: Session) -> Iterator[Any]:
    """With a bar for what has begun and one for all, on standard error; gives what the suite calls ``begin``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=run.console) as progress:
        whole = progress.add_task("all", total=None)
        current = progress.add_task("")

        def begin(text: str, steps: int, number: int, count: int) -> Any:
            progress.update(whole, completed=number, total=count)
            progress.reset(current, description=text, total=steps)
            return lambda: progress.advance(current)

        yield begin
        progress.update(whole, completed=progress.tasks[whole].total)


def _write(outcome: Any, json_file: Path | None, plot: Path | None, report: Path | None, run: Session) -> None:
    if json_file is not None:
        outcome.write(json_file)
        run.say(f"rows: {json_file}")
    pictures = import_module("_plots").draw(outcome.rows, plot) if plot is not None else []
    for path, _ in pictures:
        run.say(f"plot: {path}")
    if report is not None:
        import_module("_report").write(report, outcome.rows, pictures)
        run.say(f"report: {report}")
