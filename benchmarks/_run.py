# SPDX-License-Identifier: Apache-2.0
"""A run of ``softprompt-fast bench``: the tests first, then every case in some processes, then rows.

One process after another goes through all cases (``_worker.py``): what a process gets of the machine's memory, and
when it runs, makes a difference that rounds within one can't show. In a process the systems take turns, and their
results are compared in every round. A row has a ratio only where

* the results agree: the worst error of any round is within the case's tolerance, and
* the tests of what is measured are green (`GATES`): they run first, once for all cases that need them.

A peer that fails, hangs or ends its process is left out with the reason; where ours does, the case is. Rows are there
as soon as they are known, and gain confidence with every process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import _memory
from _harness import MACHINE, ROOT, compared, flat, setting, shown, spread
from _processes import Process, ProcessError
from _suite import GATES, OURS, SETS, SYSTEMS, Case, Row, duration, size
from rich.table import Table

import softprompt_fast

PROCESSES = 3
"""Two runs whose processes differ as normal variables do have intervals apart in one row of 200."""
LIMIT = 900.0
"""Seconds after which a peer's turn, or making a case ready, counts as hanging: compiling a model takes minutes."""


class Asked(Protocol):
    """A process that measures."""

    def ask(self, request: str, /, *, limit: float | None = None, **arguments: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


def red_tests(name: str) -> str | None:
    """Run one of `GATES`. None where all is green, else what pytest said last."""
    files, expression = GATES[name]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["-m", "not slow and not real", "-k", expression]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said += (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"])[-1:]
    return f"{' '.join(files)}: {said[0][:200]}"


@dataclass
class Place:
    """Where rows are measured, the same for all rows of a run."""

    device: str
    versions: dict[str, str]
    commit: str | None
    allocator: str

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Place:
        """``facts``: of `setting`."""
        device = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa'] or 'no C++ kernels'}"
        versions = {"softprompt_fast": softprompt_fast.__version__, **facts["packages"]}
        return cls(device, versions, facts["commit"], _memory.allocator())


# -- measuring --------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A system could not do its turn; ``ended``: nor can its process go on."""

    def __init__(self, system: str, why: str, ended: bool) -> None:
        super().__init__(why)
        self.system, self.why, self.ended = system, why, ended


@dataclass
class Found:
    """What one process found of a case. ``samples``: system -> what -> seconds, one a round."""

    facts: dict[str, Any]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    roof: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Measured:
    """A case, and what is known of it so far.

    Attributes:
        names: the systems asked for. rounds: of each process.
        skipped: systems that are left out, and why; with ours, all are.
        memory: bytes that a system's turn takes at its peak, or why they are not known.
    """

    case: Case
    names: frozenset[str]
    rounds: int
    skipped: dict[str, str]
    found: list[Found] = field(default_factory=list)
    memory: dict[str, int | str] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, names: Collection[str], quick: bool) -> Measured:
        left_out = case.slow & {*names} if quick else ()
        skipped = dict.fromkeys(left_out, "takes too long for the quick run: --full")
        return cls(case, frozenset(names), case.rounds[0 if quick else 1], skipped)

    def measure(
        self, start: Callable[[], Asked], process: Asked | None, number: int, tick: Callable[[], None]
    ) -> Asked | None:
        """In one more process, the ``number``-th, begun by ``start`` where there is none; it, unless it has ended."""
        while OURS not in self.skipped:
            process = process or start()
            try:
                self.found.append(self._measured_in(process, number, tick))
                break
            except Failed as failed:
                self.skipped[failed.system] = failed.why
                if failed.ended:
                    process.close()
                    process = None
        return process

    def _measured_in(self, process: Asked, number: int, tick: Callable[[], None]) -> Found:
        def ask(of: str, request: str, /, **arguments: Any) -> dict[str, Any]:
            """On behalf of a system, whose fault it is where there is no answer."""
            try:
                answer = process.ask(request, limit=LIMIT, **arguments)
            except ProcessError as error:
                raise Failed(of, str(error).replace("\n", " ")[-300:], ended=True) from None
            if why := answer.get("error"):
                raise Failed(of, why, ended=False)
            return answer

        left = self.names - self.skipped.keys()
        found = Found(ask(OURS, "prepare", case=self.case.id, systems=sorted(left), seed=number))
        self.skipped |= found.facts["skipped"]
        systems = found.facts["systems"]
        for _ in range(self.case.warmup):
            ask(OURS, "inputs")
            for name in systems:
                ask(name, "warm", system=name)
            tick()
        roofline = found.facts["flops"] + found.facts["moved"] > 0
        for _ in range(self.rounds):
            ask(OURS, "inputs")
            for name in systems:
                for what, seconds in ask(name, "turn", system=name)["times"].items():
                    found.samples.setdefault(name, {}).setdefault(what, []).append(seconds)
            for name, error in ask(OURS, "check")["errors"].items():
                found.errors.setdefault(name, []).append(error)
            for name, seconds in ask(OURS, "machine")["times"].items() if roofline else ():
                found.roof.setdefault(name, []).append(seconds)
            tick()
        return found

    def remember(self, start: Callable[[], Asked], process: Asked | None, tick: Callable[[], None]) -> Asked | None:
        """What turns take of memory, in a process that does nothing else; it, unless it has ended."""
        process = process or start()
        left = sorted(self.names - self.skipped.keys())

        def ask(request: str, **arguments: Any) -> dict[str, Any]:
            answer = process.ask(request, limit=LIMIT, **arguments)
            if why := answer.get("error"):
                raise ValueError(why)
            return answer

        try:
            ask("prepare", case=self.case.id, systems=left)
            for name in left:
                try:
                    ask("inputs")
                    ask("warm", system=name)
                    self.memory[name] = ask("memory", system=name)["bytes"]
                except ProcessError:
                    raise
                except ValueError as error:
                    self.memory[name] = str(error)
                tick()
        except ValueError as error:
            self.memory = dict.fromkeys(left, str(error).replace("\n", " ")[-300:]) | self.memory
            if isinstance(error, ProcessError):
                process.close()
                return None
        return process

    # -- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, place: Place, red: Sequence[str], quick: bool) -> list[Row]:
        """None before a process has found something.

        Args:
            red: what the tests said that failed; ratios are then withheld.
        """
        rows = []

        def row(system: str, what: str = "", **known: Any) -> None:
            identity = "/".join(filter(None, (self.case.id, system, what.replace(" ", "-"))))
            command = f"softprompt-fast bench --only {identity}{'' if quick else ' --full'}"
            about = {"peer": SYSTEMS.get(system, system), "work": self.case.work, "command": command}
            rows.append(Row(identity, **about, **asdict(place), **known))

        for name in (one for one in self.case.systems if one in self.names):
            if OURS in self.skipped or name in self.skipped:
                why = self.skipped.get(name) or f"ours could not run: {self.skipped[OURS]}"
                row(name, skipped=why)
            elif self.found:
                for what in self.found[0].samples[name]:
                    row(name, what, **self._timed(name, what, red))
                if name in self.memory:
                    row(name, "memory", **self._remembered(name))
        return rows

    def _timed(self, name: str, what: str, red: Sequence[str]) -> dict[str, Any]:
        facts, samples = self.found[0].facts, self._samples(name, what)
        known: dict[str, Any] = {"flops": facts["flops"], "bytes": facts["moved"]}
        known |= {"samples": samples, "seconds": spread(flat(samples))}
        known["agreement"] = {name: facts[name] for name in ("compared", "tolerance")} | {"error": self._error(name)}
        roof = {one: flat([found.roof[one] for found in self.found]) for one in self.found[0].roof}
        if roof and what in ("call", "total"):
            shares = MACHINE.share_of_roofline(roof, flat(samples), facts["flops"], facts["moved"])
            gemm = min(shares, key=lambda name: shares[name]["median"])  # the one that is faster here
            known["roofline"] = shares[gemm]
            rates = MACHINE.rates(roof)
            known["rates"] = {"flops": 1e9 * rates[gemm]["median"], "bytes": 1e9 * rates["copy"]["median"]}
        if name != OURS and what in self.found[0].samples[OURS]:
            known["withheld"] = self._why_no_ratio(name, red)
            if known["withheld"] is None:
                known["ratio"] = compared(samples, self._samples(OURS, what))
        return known

    def _remembered(self, name: str) -> dict[str, Any]:
        used, ours = self.memory[name], self.memory.get(OURS)
        if isinstance(used, str):
            return {"skipped": used}
        over = {"ratio": used / ours} if name != OURS and isinstance(ours, int) and ours else {}
        return {"memory": {"bytes": used, **over}}

    def _samples(self, name: str, what: str) -> list[list[float]]:
        return [found.samples[name][what] for found in self.found]

    def _error(self, name: str) -> float:
        """The worst of all rounds; a NaN stays."""
        worst = 0.0
        for error in flat([found.errors[name] for found in self.found]):
            worst = error if not error <= worst else worst
            if worst != worst:
                break
        return worst

    def _why_no_ratio(self, name: str, red: Sequence[str]) -> str | None:
        if red:
            return f"tests are red: {'; '.join(red)}"
        tolerance = self.found[0].facts["tolerance"]
        errors = {one: self._error(one) for one in (OURS, name)}
        wrong = [f"{one} is off by {error:.1e}" for one, error in errors.items() if not error <= tolerance]
        return f"results do not agree: {' and '.join(wrong)}, tolerance {tolerance:.0e}" if wrong else None


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run gave. ``tests``: gate -> what was red, None where all was green."""

    setting: dict[str, Any]
    rows: list[Row]
    tests: dict[str, str | None]
    seconds: float

    @property
    def well(self) -> bool:
        """Whether all tests were green, all results agreed and ours ran."""
        ours = [row for row in self.rows if row.system == OURS and row.what != "memory"]
        return not (any(self.tests.values()) or any(row.withheld for row in self.rows) or any(x.skipped for x in ours))

    def write(self, path: Path) -> None:
        """The whole file or, should that fail, the one that was there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row.as_dict() for row in self.rows]
        result = {"setting": self.setting, "seconds": self.seconds, "tests": self.tests, "rows": rows}
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        new.replace(path)


@contextlib.contextmanager
def processes(*arguments: str) -> Iterator[Callable[[], Asked]]:
    """What starts a process, with this one's package. ``arguments``: of the worker."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="softprompt-fast-bench-")))
        tree = Path(softprompt_fast.__file__).resolve().parents[1]

        def start() -> Asked:
            process = Process("the measuring process", tree, Path(__file__).parent, folder / "log", arguments)
            stack.callback(process.close)
            process.wait()
            return process

        yield start


def run(
    chosen: Sequence[tuple[Case, frozenset[str]]],
    *,
    quick: bool = True,
    begin: Callable[[str, int, int, int], Callable[[], None]] = lambda *unused: lambda: None,
    known: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """The tests, then every case in one process after another.

    Args:
        begin: told what begins, in how many steps it ends, its number and of how many; gives what is called after
            each step.
        known: given what there is after every case.
    """
    started = time.perf_counter()
    gates = list(dict.fromkeys(name for case, _ in chosen for name in case.tests))
    steps = itertools.count()
    count = len(gates) + PROCESSES * len(chosen) + sum(case.memory for case, _ in chosen)
    tests: dict[str, str | None] = {}
    for name in gates:
        tick = begin(f"tests of {name}", 1, next(steps), count)
        tests[name] = red_tests(name)
        tick()
    facts = setting()
    place, cases = Place.of(facts), [Measured.of(case, names, quick) for case, names in chosen]

    def outcome() -> Outcome:
        rows = []
        for one in cases:
            rows += one.rows(place, [said for name in one.case.tests if (said := tests[name])], quick)
        return Outcome(facts, rows, tests, time.perf_counter() - started)

    process: Asked | None
    for number in range(PROCESSES):
        with processes() as start:
            process = None
            for one in cases:
                text = f"{one.case.id}, process {number + 1} of {PROCESSES}"
                tick = begin(text, one.case.warmup + one.rounds, next(steps), count)
                process = one.measure(start, process, number, tick)
                known(outcome())
    if remembered := [one for one in cases if one.case.memory and OURS not in one.skipped]:
        with processes(_memory.GIVE_BACK) as start:
            process = None
            for number, one in enumerate(remembered, count - len(remembered)):
                tick = begin(f"{one.case.id}, memory", len(one.names - one.skipped.keys()), number, count)
                process = one.remember(start, process, tick)
                known(outcome())
    return outcome()


def expected(chosen: Sequence[tuple[Case, frozenset[str]]], rows: Sequence[Row], quick: bool) -> tuple[float, int]:
    """Seconds of all turns, as long as those of rows at hand, and how many systems have none there. Tests, loading,
    compiling and checking come on top."""
    whole = {row.parts[:3]: row.seconds["median"] for row in rows if row.seconds and row.what in ("call", "total")}
    short = {row.parts[:3]: row.seconds["median"] for row in rows if row.seconds and row.what == "first-token"}
    seconds, unknown = 0.0, 0
    for case, names in chosen:
        for name in names - (case.slow if quick else frozenset()):
            found = whole.get((case.set, case.name, name), 0.0)
            warm = case.warmup * short.get((case.set, case.name, name), found)
            seconds += PROCESSES * (warm + case.rounds[0 if quick else 1] * found) + case.memory * (warm + found)
            unknown += not found
    return seconds, unknown


def tables(outcome: Outcome) -> Iterator[Table]:
    """A table for each set."""
    for name in SETS:
        rows = [row for row in outcome.rows if row.set == name]
        if not rows:
            continue
        table = Table(title=f"{name}: median (p20 to p80); ratios: how many times as much as ours")
        columns = ("time or memory", "ratio", "95% of the median", "of the roofline", "agreement")
        for column in ("case", "system", "what", *columns):
            table.add_column(column)
        before = ""
        for row in rows:
            between = f"{row.ratio['low']:.2f} to {row.ratio['high']:.2f}" if row.ratio else ""
            table.add_row(
                row.case if row.case != before else "",
                row.system,
                row.what,
                amount(row),
                over_ours(row),
                between,
                shown(row.roofline, "%") if row.roofline else "",
                f"{row.agreement['error']:.0e}" if row.agreement else "",
            )
            before = row.case
        yield table


def amount(row: Row) -> str:
    if row.memory:
        return size(row.memory["bytes"])
    return duration(row.seconds) if row.seconds else f"not run: {row.skipped}"


def over_ours(row: Row) -> str:
    if row.memory and "ratio" in row.memory:
        return f"{row.memory['ratio']:.2f}x the memory"
    return shown(row.ratio) if row.ratio else f"none: {row.withheld}" if row.withheld else ""
