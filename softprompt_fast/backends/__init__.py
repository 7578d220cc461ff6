# SPDX-License-Identifier: Apache-2.0
"""Implementations of the ops, one folder a backend, one file an op."""
