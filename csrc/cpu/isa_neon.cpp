// SPDX-License-Identifier: Apache-2.0
// NEON of AArch64.
#include "kernels.h"

#if defined(__aarch64__)
#define SOFTPROMPT_FAST_ISA neon
#define SOFTPROMPT_FAST_ISA_NAME "neon"
#define SOFTPROMPT_FAST_VECTOR_BYTES 16
#include "isa.h"

namespace softprompt_fast {
const Kernels* neon_kernels() { return &neon::kKernels; }
}  // namespace softprompt_fast
#else
namespace softprompt_fast {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace softprompt_fast
#endif
