// SPDX-License-Identifier: Apache-2.0
// A warpgroup's matrix products (wgmma, of sm_90a only): four warps, the first a multiple of four,
// multiply 64 rows, 16 a warp, asynchronously. Operands lie in shared memory in the tensor cores'
// 128-byte swizzle (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"): panels of
// 64 columns of 16 bits, a panel's row 128 bytes, of which chunk c of 16 bytes is at place
// c ^ row % 8. A panel begins at a multiple of 1024 bytes.
//
// Between a product's issue and the wait for it nobody may touch its accumulator, nor write
// registers and shared memory that it reads. wgmma_fence() comes between ordinary writes of
// registers and the products that use them; fence_proxy_async() between ordinary writes of shared
// memory (cp.async's too, waited for) and the barrier behind which products read it.
#pragma once

#include "device.cuh"

namespace softprompt_fast {
namespace cuda {

constexpr int kPanel = 64, kPanelRow = kPanel * 2;  // columns, bytes

// Where an operand begins in shared memory: the half of its descriptor that differs, an address and
// the distance of its panels, in units of 16 bytes. Its other half: eight rows are a group.
struct Operand {
  uint32_t low;
  static constexpr uint32_t kHigh = 1u << 30 | 8 * kPanelRow >> 4;

  __device__ __forceinline__ Operand moved(int bytes) const {
    return {low + (uint32_t)(bytes >> 4)};
  }
};

__device__ __forceinline__ Operand operand(const void* first, int panel_bytes) {
  const int panel = panel_bytes >> 4 << 16;
  return {(uint32_t)opaque((int)(shared_address(first) >> 4) | panel)};
}

#if defined(__CUDACC__)

__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group: the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups, the latest, are still under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving what defines or uses a product's registers across an issue or
// wait.
template <int n>
__device__ __forceinline__ void settle(float (&x)[n][4]) {
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <int n>
__device__ __forceinline__ void settle(uint32_t (&x)[n][4]) {
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

#define SOFTPROMPT_FAST_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SOFTPROMPT_FAST_32(i)                                                       \
  SOFTPROMPT_FAST_4(i), SOFTPROMPT_FAST_4(i + 1), SOFTPROMPT_FAST_4(i + 2),         \
      SOFTPROMPT_FAST_4(i + 3), SOFTPROMPT_FAST_4(i + 4), SOFTPROMPT_FAST_4(i + 5), \
      SOFTPROMPT_FAST_4(i + 6), SOFTPROMPT_FAST_4(i + 7)
#define SOFTPROMPT_FAST_NAMES_32                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SOFTPROMPT_FAST_NAMES_64                                                            \
  SOFTPROMPT_FAST_NAMES_32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64, 64] (+)= a[64, 16] b[64, 16]^T, T times T into float: both by rows, in shared memory.
// A warp has its 16 rows of d as eight results of mma_m16n8k16, side by side. `add`: to what is
// there.
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], Operand a, Operand b, bool add);

// d[64, 8 n] += a[64, 16] b[16, 8 n], n 8 or 16: a in registers, 16 rows a warp, as mma_m16n8k16
// takes them; b by rows in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[8][4], const uint32_t (&a)[4], Operand b);
template <typename T>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[16][4], const uint32_t (&a)[4], Operand b);

// Behind the accumulator's names: a's registers, or the descriptor's half; b's; `add`; kHigh.
#define SOFTPROMPT_FAST_WGMMA_SHARED(shape, type, names)                 \
  "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %34, 0;\n"          \
  "mov.b64 a, {%32, %35};\nmov.b64 b, {%33, %35};\n"                     \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names \
  "},"                                                                   \
  " a, b, p, 1, 1, 0, 0;\n}"
#define SOFTPROMPT_FAST_WGMMA_REGISTERS(shape, type, names, a, low, high, add) \
  "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " add                        \
  ", 0;\n"                                                                     \
  "mov.b64 b, {" low ", " high                                                 \
  "};\n"                                                                       \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names       \
  "},"                                                                         \
  " {" a "}, b, p, 1, 1, 1;\n}"
#define SOFTPROMPT_FAST_WGMMA(T, type)                                                          \
  template <>                                                                                   \
  __device__ __forceinline__ void wgmma_m64n64k16<T>(float (&d)[8][4], Operand a, Operand b,    \
                                                     bool add) {                                \
    asm volatile(SOFTPROMPT_FAST_WGMMA_SHARED("m64n64k16", type, SOFTPROMPT_FAST_NAMES_32)      \
                 : SOFTPROMPT_FAST_32(0)                                                        \
                 : "r"(a.low), "r"(b.low), "r"((int)add), "r"(Operand::kHigh));                 \
  }                                                                                             \
  template <>                                                                                   \
  __device__ __forceinline__ void wgmma_m64k16<T>(float (&d)[8][4], const uint32_t (&a)[4],     \
                                                  Operand b) {                                  \
    asm volatile(SOFTPROMPT_FAST_WGMMA_REGISTERS("m64n64k16", type, SOFTPROMPT_FAST_NAMES_32,   \
                                                 "%32, %33, %34, %35", "%36", "%37", "%38")     \
                 : SOFTPROMPT_FAST_32(0)                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(Operand::kHigh), \
                   "r"(1));                                                                     \
  }                                                                                             \
  template <>                                                                                   \
  __device__ __forceinline__ void wgmma_m64k16<T>(float (&d)[16][4], const uint32_t (&a)[4],    \
                                                  Operand b) {                                  \
    asm volatile(SOFTPROMPT_FAST_WGMMA_REGISTERS("m64n128k16", type, SOFTPROMPT_FAST_NAMES_64,  \
                                                 "%64, %65, %66, %67", "%68", "%69", "%70")     \
                 : SOFTPROMPT_FAST_32(0), SOFTPROMPT_FAST_32(8)                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(Operand::kHigh), \
                   "r"(1));                                                                     \
  }
SOFTPROMPT_FAST_WGMMA(Half, "f16")
SOFTPROMPT_FAST_WGMMA(BFloat16, "bf16")
#undef SOFTPROMPT_FAST_WGMMA
#undef SOFTPROMPT_FAST_WGMMA_REGISTERS
#undef SOFTPROMPT_FAST_WGMMA_SHARED
#undef SOFTPROMPT_FAST_NAMES_64
#undef SOFTPROMPT_FAST_NAMES_32
#undef SOFTPROMPT_FAST_32
#undef SOFTPROMPT_FAST_4

#else

inline void fence_proxy_async() { emulator::thread().unfenced = false; }
inline void wgmma_fence() { __syncwarp(); }
inline void wgmma_commit() {
  char nothing = 0;
  emulator::block().warp_meets("wgmma.commit", nothing, [](char**) {
    emulator::block().warp_leader().products.emplace_back();
  });
}
template <typename T, int n>
void settle(T (&)[n][4]) {}

namespace emulator {

// A warp's products until `pending` groups are left, in the order of their issue.
inline void finish_products(int pending) {
  auto& groups = block().warp_leader().products;
  while ((int)groups.size() - 1 > pending) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}

// Element (row, k) of an operand whose rows are k's (`by_k`) or the product's rows.
template <typename T>
float element(Operand from, int row, int k, bool by_k) {
  const int line = by_k ? k : row, column = by_k ? row : k;
  const uint32_t first = (from.low & 0x3FFF) << 4, panel = from.low >> 16 << 4;
  const uint32_t eight_rows = (Operand::kHigh & 0x3FFF) << 4;
  uint32_t at = first + line / 8 * eight_rows + line % 8 * kPanelRow + column / kPanel * panel +
                column % kPanel * 2;
  at ^= (at >> 7 & 7) << 4;
  const unsigned char* found = block().shared_memory() + at;
  check_shared(found, sizeof(T), "wgmma");
  return to_float(*(const T*)found);
}

// Lanes' results d[n / 8][4], and operand a of them or of shared memory.
struct GroupProduct {
  float (*d)[4];
  const uint32_t* a;
  Operand from_a, b;
  int n;
  bool add;
};

template <typename T>
void multiply_group(const GroupProduct* lanes, int warp) {
  float a[16][16];
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 8 && lanes[0].a != nullptr; ++i) {
      const float2 pair = unpack2<T>(lanes[l].a[i / 2]);
      a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i / 4 * 8 + i % 2] = i % 2 ? pair.y : pair.x;
    }
  }
  for (int r = 0; r < 16 && lanes[0].a == nullptr; ++r) {
    for (int k = 0; k < 16; ++k) a[r][k] = element<T>(lanes[0].from_a, warp * 16 + r, k, false);
  }
  for (int column = 0; column < lanes[0].n; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) {
      b[k] = element<T>(lanes[0].b, column, k, lanes[0].a != nullptr);
    }
    for (int r = 0; r < 16; ++r) {
      const GroupProduct& lane = lanes[r % 8 * 4 + column % 8 / 2];
      float& sum = lane.d[column / 8][r / 8 * 2 + column % 2];
      if (!lane.add) sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[r][k] * b[k];
    }
  }
}

template <typename T>
void issue(GroupProduct bring) {
  block().warp_meets("wgmma", bring, [](GroupProduct** lanes) {
    if (block().any_unfenced()) block().fail("wgmma: copies without a fence for tensor cores");
    std::vector<GroupProduct> all;
    for (int l = 0; l < kWarp; ++l) all.push_back(*lanes[l]);
    const int warp = thread().number / kWarp % 4;
    auto& groups = block().warp_leader().products;
    groups.back().push_back([all, warp] { multiply_group<T>(all.data(), warp); });
    if (random_bits() & 1) return;
    for (auto& group : groups) {
      for (const auto& product : group) product();
      group.clear();
    }
  });
}

}  // namespace emulator

template <int pending>
void wgmma_wait() {
  char nothing = 0;
  emulator::block().warp_meets("wgmma.wait", nothing,
                               [](char**) { emulator::finish_products(pending); });
}

template <typename T>
void wgmma_m64n64k16(float (&d)[8][4], Operand a, Operand b, bool add) {
  emulator::issue<T>({d, nullptr, a, b, 64, add});
}
template <typename T, int n>
void wgmma_m64k16(float (&d)[n][4], const uint32_t (&a)[4], Operand b) {
  emulator::issue<T>({d, a, {}, b, 8 * n, true});
}

#endif

}  // namespace cuda
}  // namespace softprompt_fast
