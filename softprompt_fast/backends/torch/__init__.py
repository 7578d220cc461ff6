# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch backend: runs on every device PyTorch does."""
