# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package.

All of them are `ValueError`s, so that code which does not care which one it got can catch that alone.
"""

from __future__ import annotations


class SoftPromptError(ValueError):
    """Base class of this package's own errors."""


class AdapterError(SoftPromptError):
    """An adapter (its configuration or its tensors) cannot be read, or is of a kind this package does not serve."""


class IncompatibleBaseError(AdapterError):
    """An adapter was made for a base model of another shape."""


class PrefixError(SoftPromptError):
    """A saved `PrefixKV` is damaged, altered, or of a format this version cannot read."""


class PrefixFingerprintError(PrefixError):
    """A saved `PrefixKV` was computed with another base model."""


class NonFiniteLossError(SoftPromptError):
    """Training met a loss or a gradient that is NaN or infinite, and stopped before its optimizer step.

    Attributes:
        step: the optimizer step (from 1) that was not taken: the parameters are those after ``step - 1``.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class BankFullError(SoftPromptError):
    """A prefix does not fit a bank's budget: what running calls hold, or what was given, takes it.

    Where holds take it, the same call succeeds once enough of them were released.
    """
