# SPDX-License-Identifier: Apache-2.0
"""Each op in Triton, for NVIDIA GPUs from compute capability 8.0 on; tests run them on the CPU, interpreted."""
