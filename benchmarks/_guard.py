# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast bench --against REV``: is this tree slower than another revision of it?

Both are built from their sources in a temporary folder: the revision in a git worktree, this tree as a copy, changes
that are not committed and files that git does not know yet included. The cases are this tree's; ours alone is timed.
Three processes take turns, one computing while the others wait: the revision (A), this tree (B), and the revision
again (C). A round gives two ratios: A over B, which is the answer, and A over C, which is what this machine, and the
luck of a process with its memory, make of no change at all.

A row is called slower or faster only where the 95% interval of the first ratio's median lies outside that of the
second (widened to both sides of 1, as it is chance which of two equal processes is called A), in two measurements by
processes of their own. Where the two revisions' results differ, no ratio is given.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _gpu import relative_error
from _harness import ROOT, compared, milliseconds, setting
from _processes import Process
from _suite import OURS, Case
from rich.table import Table
from torch import Tensor

MODE = "SOFTPROMPT_FAST_BUILD"
FEWEST_ROUNDS = 9
"""With fewer than six the interval has less confidence than it says."""
PAUSE = 0.02
"""Seconds before a turn: after a parallel region OpenMP's threads spin for some milliseconds before they sleep."""
Tick = Callable[[], None]
Begin = Callable[[str, int, int, int], Tick]
"""Told what begins, in how many steps it ends, its number and of how many; gives what is called after each step."""


class GuardError(ValueError):
    """Why two revisions can't be compared here."""


# -- two trees --------------------------------------------------------------------------------------------------------


def git(*arguments: str, at: Path) -> str:
    """What git prints.

    Raises:
        GuardError: there is no git, or it fails; with what it says.
    """
    try:
        done = subprocess.run(["git", "-C", str(at), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise GuardError(f"git: {error}") from None
    if done.returncode:
        raise GuardError(f"git {arguments[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def commit_of(revision: str, at: Path) -> str:
    """The full name of a revision's commit."""
    try:
        top = Path(git("rev-parse", "--show-toplevel", at=at).strip())
    except GuardError as error:
        raise GuardError(f"--against needs a git checkout of softprompt-fast, and {at} is none ({error})") from None
    if top.resolve() != at.resolve():
        raise GuardError(f"--against needs a git checkout of softprompt-fast, and {at} is a folder of another: {top}")
    try:
        return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", at=at).strip()
    except GuardError:
        raise GuardError(f"--against {revision}: git knows no such revision here") from None


@contextlib.contextmanager
def worktree(commit: str, folder: Path, at: Path) -> Iterator[None]:
    """A checkout of a commit in ``folder``, which git forgets about in the end."""
    git("-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(folder), commit, at=at)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", str(folder), at=at)


def copy_tree(source: Path, folder: Path) -> None:
    """The tree as it is: files that git tracks, changed or not, and new ones that it does not ignore."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", at=source).split("\0")
    for name in filter(None, dict.fromkeys(names)):
        if os.path.lexists(source / name):  # tracked files may have been deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name, follow_symlinks=False)


def built_from(tree: Path) -> set[str]:
    """The files that decide what is built."""
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    return sources | {"setup.py", "softprompt_fast/_version.py"}


def same_sources(tree: Path, like: Path) -> bool:
    files = built_from(tree)
    return files == built_from(like) and not any(filecmp.cmpfiles(tree, like, files, shallow=False)[1:])


def extensions(tree: Path) -> list[Path]:
    return [path for path in (tree / "softprompt_fast").glob("_C.*") if path.suffix in (".so", ".pyd")]


def build(tree: Path, name: str, like: Path | None = None) -> None:
    """The C++ extension, from the tree's own sources; copied from the tree ``like`` if those are the same. The
    environment variable SOFTPROMPT_FAST_BUILD=0 leaves it out.

    Raises:
        GuardError: it can't be built, with what the compiler says.
    """
    if like is not None and same_sources(tree, like):
        for path in extensions(like):
            shutil.copy2(path, tree / path.relative_to(like))
        return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, MODE: os.environ.get(MODE, "1")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise GuardError("\n".join([f"{name}: the C++ extension can't be built:", *said[-20:]]))


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One case and one thing timed.

    Attributes:
        samples: seconds a round, of the revision ("base"), of this tree ("head") and of the revision again ("again").
        ratio: the revision's seconds over this tree's, so above 1 this tree is faster: median, p20, p80 and the 95%
            interval of the median, low to high.
        noise: the same of the revision over itself, low and high widened to both sides of 1.
        verdict: "slower", "faster", "" where noise explains the ratio, "differs" where results do, "fails" where this
            tree can't run what the revision can.
        error: by how much this tree's result differs from the revision's, and the tolerance.
        backends: by side, which backends served each op.
        why: there is no ratio.
    """

    id: str
    verdict: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    ratio: dict[str, float] | None = None
    noise: dict[str, float] | None = None
    error: float | None = None
    tolerance: float | None = None
    backends: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    why: str | None = None

    def is_of(self, case: Case) -> bool:
        return case.id in (self.id, self.id.rpartition("/")[0])


TIMED = ("slower", "faster")


def noise_interval(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """What two equal processes differ by."""
    found = compared([over], [under])
    low, high = min(found["low"], 1 / found["high"]), max(found["high"], 1 / found["low"])
    return {**found, "low": low, "high": high}


def verdict(ratio: Mapping[str, float], noise: Mapping[str, float]) -> str:
    """Example: 0.90 (0.88 to 0.92) with noise from 0.95 to 1.05 is "slower"; from 0.91 to 1.10, nothing."""
    if ratio["high"] < noise["low"]:
        return "slower"
    return "faster" if ratio["low"] > noise["high"] else ""


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative, in the Euclidean norm; of integers the share that differs. The largest of all results."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return float("inf")
    errors = [
        relative_error(x, y) if y.is_floating_point() else float((x != y).double().mean()) if y.numel() else 0.0
        for x, y in zip(found, wanted, strict=True)
    ]
    return max(errors, default=0.0) if all(e == e for e in errors) else float("nan")


SIDES = ("base", "head", "again")
THIS = "this tree"


def measure(case: Case, processes: Mapping[str, Process], folder: Path, rounds: int, tick: Tick) -> list[Row]:
    """One row for each thing that a turn times; ``processes``: one for each of `SIDES`."""
    answers: dict[str, dict[str, Any]] = {}
    for side, process in processes.items():
        for request, arguments in (
            ("prepare", {"case": case.id, "systems": [OURS]}),
            ("record", {"file": str(folder / f"{side}.pt"), "turns": max(1, case.warmup)}),
        ):
            answer = process.ask(request, **arguments)
            if why := answer.get("error"):
                return [Row(case.id, "fails" if side == "head" else "", why=f"{process.name}: {why}")]
            answers.setdefault(side, {}).update(answer)
    known: dict[str, Any] = {
        "backends": {side: answers[side]["backends"] for side in ("base", "head")},
        "tolerance": answers["head"]["tolerance"],
        "error": difference(*(torch.load(folder / f"{side}.pt") for side in ("head", "base"))),
    }
    if not known["error"] <= known["tolerance"]:
        why = f"results differ by {known['error']:.1e}, tolerance {known['tolerance']:.0e}"
        return [Row(case.id, "differs", why=why, **known)]
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for side in (*SIDES[number % 3 :], *SIDES[: number % 3]):  # each goes first in turn
            processes[side].ask("inputs")
            time.sleep(PAUSE)
            answer = processes[side].ask("turn", system=OURS)
            if why := answer.get("error"):
                return [Row(case.id, "fails" if side == "head" else "", why=f"{processes[side].name}: {why}", **known)]
            for what, seconds in answer["times"].items():
                samples.setdefault(what, {}).setdefault(side, []).append(seconds)
        tick()
    rows = []
    for what, timed in samples.items():
        ratio, noise = compared([timed["base"]], [timed["head"]]), noise_interval(timed["base"], timed["again"])
        name = f"{case.id}/{what.replace(' ', '-')}"
        rows.append(Row(name, verdict(ratio, noise), timed, ratio, noise, **known))
    return rows


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a run gave. ``commit``: the revision's; ``environment``: what was set for this tree alone."""

    revision: str
    commit: str
    environment: dict[str, str]
    rows: list[Row]

    @property
    def regressed(self) -> list[Row]:
        return [row for row in self.rows if row.verdict in ("slower", "differs", "fails")]

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": setting(),
            "against": {"revision": self.revision, "commit": self.commit},
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """How many rows there are of each verdict."""
        counts = Counter(row.verdict or ("no ratio" if row.ratio is None else "no difference") for row in self.rows)
        return f"{len(self.rows)} rows: " + ", ".join(f"{count} {what}" for what, count in counts.items())

    def table(self) -> Table:
        """Ratios with p20 and p80; of noise, the interval that a ratio's own must leave."""
        table = Table(title=f"this tree against {self.revision} ({self.commit[:10]})")
        columns = (f"{self.revision}, ms", "this tree, ms", "this tree is faster by", "95%", "noise", "verdict")
        for column in ("row", *columns, "backends"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            served = dict.fromkeys(names(row.backends.get(side, {})) for side in ("base", "head"))
            last = " -> ".join(filter(None, served))
            if row.ratio is None or row.noise is None:
                table.add_row(row.id, "", "", "", "", "", f"{row.verdict} {row.why}".strip(), last)
                continue
            limits = (f"{values['low']:.3g} to {values['high']:.3g}" for values in (row.ratio, row.noise))
            times = (milliseconds(row.samples[side]) for side in ("base", "head"))
            found = "{median:.3g}x ({p20:.3g} to {p80:.3g})".format(**row.ratio)
            table.add_row(row.id, *times, found, *limits, row.verdict, last)
        return table


def names(backends: Mapping[str, Sequence[str]]) -> str:
    """Such as "cpu", or "prefix_attention: cpu, prompt_qkv: torch" where ops are not served alike."""
    kinds = {"/".join(found) for found in backends.values()}
    if len(kinds) <= 1:
        return "".join(kinds)
    return ", ".join(f"{op}: {'/'.join(found)}" for op, found in backends.items())


def run(
    revision: str,
    chosen: Sequence[Case],
    *,
    environment: Mapping[str, str] | None = None,
    quick: bool = True,
    rounds: int | None = None,
    begin: Begin = lambda *unused: lambda: None,
    root: Path = ROOT,
) -> Report:
    """Build both and measure the cases; what noise does not explain is measured again.

    Args:
        environment: variables that are set for this tree's process alone, to see what a setting does.
        rounds: other than the cases' own.
        begin: for a progress bar.

    Raises:
        GuardError: there is no such revision, no checkout or no compiler.
        ProcessError: a process does not start, or ends.
    """
    environment, commit = dict(environment or {}), commit_of(revision, root)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="softprompt-fast-bench-")))
        base, head = folder / "base", folder / "head"
        stack.enter_context(worktree(commit, base, root))
        copy_tree(root, head)
        count = 2 + len(chosen)
        for number, (name, tree, like) in enumerate(((revision, base, None), (THIS, head, base))):
            tick = begin(f"building {name}", 1, number, count)
            build(tree, name, like)
            tick()

        def measured(cases: Sequence[Case], first: int, count: int) -> list[Row]:
            rows = []
            with contextlib.ExitStack() as running:
                processes = {}
                for side in SIDES:
                    name, tree, own = (THIS, head, environment) if side == "head" else (revision, base, {})
                    processes[side] = Process(name, tree, head / "benchmarks", folder / f"{side}.log", environment=own)
                    running.callback(processes[side].close)
                for process in processes.values():
                    process.wait()
                for number, case in enumerate(cases, first):
                    turns = rounds or max(FEWEST_ROUNDS, case.rounds[0 if quick else 1])
                    rows += measure(case, processes, folder, turns, begin(case.id, turns, number, count))
            return rows

        rows = measured(chosen, 2, count)
        doubtful = [case for case in chosen if any(row.verdict in TIMED and row.is_of(case) for row in rows)]
        if doubtful:
            again = {row.id: row for row in measured(doubtful, count, count + len(doubtful))}
            rows = [agreed(row, again.get(row.id)) for row in rows]
    return Report(revision, commit, environment, rows)


def agreed(row: Row, again: Row | None) -> Row:
    """A verdict on time stands only if a second measurement has it as well, against the noise of both; samples and
    ratio are then those of the second."""
    if again is None or row.verdict not in TIMED or row.noise is None or again.noise is None or again.ratio is None:
        return row
    again.noise["low"] = min(row.noise["low"], again.noise["low"])
    again.noise["high"] = max(row.noise["high"], again.noise["high"])
    again.verdict = verdict(again.ratio, again.noise)
    if again.verdict != row.verdict:
        again.verdict = ""
    return again
