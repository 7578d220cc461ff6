# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels (``csrc/cuda``): the latency path of decoding. Prefill and training stay with Triton."""
