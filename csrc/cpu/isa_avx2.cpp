// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#define SOFTPROMPT_FAST_ISA avx2
#define SOFTPROMPT_FAST_ISA_NAME "avx2"
#define SOFTPROMPT_FAST_VECTOR_BYTES 32
#include "isa.h"

namespace softprompt_fast {
const Kernels* avx2_kernels() { return &avx2::kKernels; }
}  // namespace softprompt_fast
#else
namespace softprompt_fast {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace softprompt_fast
#endif
