// SPDX-License-Identifier: Apache-2.0
// Launches a kernel on a device's stream, or runs it in the emulator.
#pragma once

#include <atomic>
#include <mutex>
#include <stdexcept>

#include "../checks.h"
#include "device.cuh"
#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace softprompt_fast {
namespace cuda {

// What a block may ask for on the smallest GPUs served, of 8.6 and 8.9. A kernel that takes more
// has to be refused there before it is launched.
constexpr size_t kSharedEverywhere = 99 << 10;

struct Grid {
  dim3 blocks;
  unsigned threads;     // of a block, whole warps
  unsigned shared = 0;  // bytes of dynamic shared memory
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        concat(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
  }
}

// Makes a device the current one, and the one before it at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
inline int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }
inline bool is_hopper(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}
inline int shared_of_block(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline int shared_of_processor(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
}

// `kernel` takes one struct by value (`const __grid_constant__`, or a pointer into it makes a copy
// in local memory). Nothing of it reads a device value or waits, so a stream may
// be capturing. std::runtime_error where the launch is refused.
template <auto kernel, typename Params>
void launch(const Queue& queue, const Grid& grid, const Params& params) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  const OnDevice on(queue.device);
  if (grid.shared > (48u << 10)) {
    static std::atomic<uint64_t> allowed{0};  // a bit a device
    const uint64_t bit = uint64_t{1} << (queue.device & 63);
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
      check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_of_block(queue.device)),
            "cudaFuncSetAttribute");
      // Of the memory that L1 and shared memory have together, so that as many blocks fit as can.
      check(
          cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "cudaFuncSetAttribute");
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel((const void*)kernel, grid.blocks, dim3(grid.threads), arguments,
                         grid.shared, (cudaStream_t)queue.stream),
        "cudaLaunchKernel");
}

// Allowed while streams capture, on this thread or another: it is no part of what they capture.
inline void* allocate(const Queue& queue, size_t bytes) {
  const OnDevice on(queue.device);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* at = nullptr;
  const cudaError_t error = cudaMalloc(&at, bytes);
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  check(error, "cudaMalloc");
  return at;
}

inline void set_zero(const Queue& queue, void* at, size_t bytes) {
  const OnDevice on(queue.device);
  check(cudaMemsetAsync(at, 0, bytes, (cudaStream_t)queue.stream), "cudaMemsetAsync");
}

#else

inline int processors(int) { return 4; }  // few, so that tests split their work too
inline bool is_hopper(int) { return true; }
inline int shared_of_block(int) { return 227 << 10; }
inline int shared_of_processor(int) { return 228 << 10; }

// One kernel after another, as on a stream, whichever threads they come from.
inline std::mutex stream;

template <auto kernel, typename Params>
void launch(const Queue&, const Grid& grid, const Params& params) {
  const std::lock_guard<std::mutex> lock(stream);
  emulator::run(kernel, grid.blocks, dim3(grid.threads), grid.shared, params);
}

inline void* allocate(const Queue&, size_t bytes) { return new uint64_t[(bytes + 7) / 8]; }

inline void set_zero(const Queue&, void* at, size_t bytes) { memset(at, 0, bytes); }

#endif

// Calls body(T()) with the type of a floating dtype.
template <typename Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Half());
    default:
      throw std::invalid_argument(
          concat("expected a floating dtype code 0..2, found ", (int)dtype));
  }
}

// The same for the types that tensor cores take.
template <typename Body>
void with_16_bits(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Half());
    default:
      throw std::invalid_argument(
          concat("expected a 16-bit dtype code 1 or 2, found ", (int)dtype));
  }
}

}  // namespace cuda
}  // namespace softprompt_fast
