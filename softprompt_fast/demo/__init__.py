# SPDX-License-Identifier: Apache-2.0
"""The demo: a soft prompt trained, saved, loaded and timed on a real model and real text."""

from softprompt_fast.demo.assets import AssetError, Review, load_demo_model, load_model, load_reviews

__all__ = ["AssetError", "Review", "load_demo_model", "load_model", "load_reviews"]
