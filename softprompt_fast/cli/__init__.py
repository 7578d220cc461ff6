# SPDX-License-Identifier: Apache-2.0
"""The command line ``softprompt-fast``."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code (imported late: ``--help`` needs neither torch nor transformers)."""
    from softprompt_fast.cli.app import app

    app(prog_name="softprompt-fast")
