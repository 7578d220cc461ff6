# SPDX-License-Identifier: Apache-2.0
"""``python -m softprompt_fast.cli``."""

from softprompt_fast.cli import main

main()
