# SPDX-License-Identifier: Apache-2.0
"""The demo: a soft prompt trained, saved, loaded and timed on a real model and real text."""
