// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 bytes, which every x86-64 (SSE2) and AArch64 has, and what the compiler makes of
// them elsewhere.
#define SOFTPROMPT_FAST_ISA portable
#define SOFTPROMPT_FAST_ISA_NAME "portable"
#define SOFTPROMPT_FAST_VECTOR_BYTES 16
#include "isa.h"

namespace softprompt_fast {
const Kernels* portable_kernels() { return &portable::kKernels; }
}  // namespace softprompt_fast
