# SPDX-License-Identifier: Apache-2.0
"""Each op in C++ (``csrc/cpu``), for float32, bfloat16 and float16 on the CPU; arithmetic is float32 throughout."""
