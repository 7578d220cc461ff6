# SPDX-License-Identifier: Apache-2.0
"""What every command shares: exit codes, where output goes, and how an error reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console


class Exit(IntEnum):
    """The exit codes. 2 is the one that click gives to a wrong command line."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    IO = 4
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected error (a bug), no GPU to tune for, or a benchmark whose tests are red, whose "
    "results do not agree or which is slower (--fail); 2 wrong command line; 3 an input does not fit (adapter for "
    "another base, unknown prompt name, altered file, ...), or a loss turned NaN; 4 a file, a download or an optional "
    "package is missing or can't be read or written; 130 interrupted."
)

DEBUG_VARIABLE = "SOFTPROMPT_FAST_DEBUG"


class Session:
    """One run of one command.

    With ``as_json`` standard output carries one JSON document and nothing else; whatever a library prints there goes
    to standard error. Progress and errors always go to standard error.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=True)
        self._result: dict[str, Any] | None = None

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def finish(self, result: dict[str, Any]) -> None:
        """Set the document that ``--json`` prints when the command has ended well."""
        self._result = result


@contextmanager
def session(as_json: bool, extra: str = "demo") -> Iterator[Session]:
    """Run a command's body: errors become one line and an exit code, the result becomes JSON if asked for.

    ``extra`` is the optional dependency group that the command needs.
    """
    current = Session(as_json)
    try:
        if as_json:
            with redirect_stdout(sys.stderr):
                yield current
        else:
            yield current
        if as_json and current._result is not None:
            print(json.dumps(current._result, indent=2), flush=True)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter)):
            raise  # typer prints these itself
        if os.environ.get(DEBUG_VARIABLE):
            raise
        code, message = _explain(error, extra)
        if as_json:
            print(json.dumps({"error": message, "exit_code": int(code)}, indent=2), flush=True)
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise typer.Exit(int(code)) from None


def _explain(error: BaseException, extra: str) -> tuple[Exit, str]:
    from softprompt_fast.backends._registry import BackendError
    from softprompt_fast.tune import NoDeviceError

    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED, message or "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return Exit.IO, f"{message}; this command needs the extra: pip install 'softprompt-fast[{extra}]'"
    if isinstance(error, OSError):
        return Exit.IO, message
    if isinstance(error, NoDeviceError):
        return Exit.UNEXPECTED, message
    if isinstance(error, (ValueError, LookupError, BackendError)):
        return Exit.INPUT, message
    return Exit.UNEXPECTED, f"unexpected {type(error).__name__}: {message} (set {DEBUG_VARIABLE}=1 for the traceback)"
