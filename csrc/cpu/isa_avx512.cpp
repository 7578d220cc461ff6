// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, DQ and VL.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SOFTPROMPT_FAST_ISA avx512
#define SOFTPROMPT_FAST_ISA_NAME "avx512"
#define SOFTPROMPT_FAST_VECTOR_BYTES 64
#include "isa.h"

namespace softprompt_fast {
const Kernels* avx512_kernels() { return &avx512::kKernels; }
}  // namespace softprompt_fast
#else
namespace softprompt_fast {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace softprompt_fast
#endif
