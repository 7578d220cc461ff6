# SPDX-License-Identifier: Apache-2.0
"""The oracles: what each op computes, in plain differentiable PyTorch, written to be read. They import torch only."""
