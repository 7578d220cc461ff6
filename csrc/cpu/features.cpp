// SPDX-License-Identifier: Apache-2.0
// Compiled with no instruction-set flags: it must run on any machine, since it decides what else
// may.
#include "features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define SOFTPROMPT_FAST_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace softprompt_fast {
namespace {

using Features = std::map<std::string, bool>;

#if defined(SOFTPROMPT_FAST_X86)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(out[0]), static_cast<uint32_t>(out[1]), static_cast<uint32_t>(out[2]),
       static_cast<uint32_t>(out[3])};
#else
  // Checks the highest leaf itself, and leaves zeros where there is no such leaf.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: the register files that the operating system saves at a context switch. Without its consent
// a wide register is not usable, whatever the processor says.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

Features detect() {
  const auto bit = [](uint64_t word, int n) { return ((word >> n) & 1) != 0; };
  const auto all = [](uint64_t word, uint64_t mask) { return (word & mask) == mask; };

  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  const Registers extended1 = cpuid(7, 1);
  const bool osxsave = bit(basic.ecx, 27);
  const uint64_t state = osxsave ? saved_state() : 0;
  const bool ymm = all(state, 0x6);      // SSE and AVX
  const bool zmm = all(state, 0xe6);     // the above, opmask, upper ZMM
  const bool tmm = all(state, 0x60000);  // AMX tiles (Linux grants them on request)

  return {
      {"sse4_2", bit(basic.ecx, 20)},
      {"avx", ymm && bit(basic.ecx, 28)},
      {"fma", ymm && bit(basic.ecx, 12)},
      {"f16c", ymm && bit(basic.ecx, 29)},
      {"avx2", ymm && bit(extended.ebx, 5)},
      {"avx_vnni", ymm && bit(extended1.eax, 4)},
      {"avx512f", zmm && bit(extended.ebx, 16)},
      {"avx512dq", zmm && bit(extended.ebx, 17)},
      {"avx512bw", zmm && bit(extended.ebx, 30)},
      {"avx512vl", zmm && bit(extended.ebx, 31)},
      {"avx512_vnni", zmm && bit(extended.ecx, 11)},
      {"avx512_bf16", zmm && bit(extended1.eax, 5)},
      {"avx512_fp16", zmm && bit(extended.edx, 23)},
      {"amx_bf16", tmm && bit(extended.edx, 22)},
  };
}

#elif defined(__aarch64__)

Features detect() {
  Features found = {{"neon", true}};  // part of the base architecture
#if defined(__linux__)
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  found["dotprod"] = (hwcap >> 20) & 1;
  found["fp16"] = (hwcap >> 10) & 1;
  found["sve"] = (hwcap >> 22) & 1;
  found["sve2"] = (hwcap2 >> 1) & 1;
  found["bf16"] = (hwcap2 >> 14) & 1;
  found["i8mm"] = (hwcap2 >> 13) & 1;
#endif
  return found;
}

#else

Features detect() { return {}; }

#endif

}  // namespace

const Features& cpu_features() {
  static const Features found = detect();
  return found;
}

}  // namespace softprompt_fast
