# SPDX-License-Identifier: Apache-2.0
"""Serving many soft prompts over one base: the embedded engine (``engine.py``) and its HTTP server (``app.py``)."""
