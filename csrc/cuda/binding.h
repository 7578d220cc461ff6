// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CUDA kernels share, on top of ../arguments.h.
#pragma once

#include "../arguments.h"
#include "../torch_abi.h"
#include "kernels.h"

namespace softprompt_fast {
namespace cuda {

// Whether the kernels run on the CPU, in emulator.h. tests/cuda_emulated.py says so.
#if defined(SOFTPROMPT_FAST_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// (device index, cudaStream_t as a number): where a call's tensors lie, and its stream there.
inline Queue as_queue(pybind11::handle given) {
  PyObject* tuple = as_tuple("queue", given, 2, "a device and a stream");
  const int64_t device = as_number("queue", PyTuple_GET_ITEM(tuple, 0));
  SOFTPROMPT_FAST_CHECK(device >= 0 && device < 1024, "queue: expected a device, found ", device);
  return {static_cast<int>(device),
          reinterpret_cast<void*>(as_number("queue", PyTuple_GET_ITEM(tuple, 1)))};
}

// The same of a tensor that an op was called with.
inline Queue queue_of(const abi::View& view) {
  if (view.is_cpu()) {
    SOFTPROMPT_FAST_CHECK(kEmulated, "expected tensors on a GPU, found ", view.describe());
    return {};
  }
  return {view.device, abi::stream(view.device)};
}

// Under what PyTorch's dispatcher knows the tensors that the kernels take.
constexpr const char* dispatch_key() { return kEmulated ? "CPU" : "CUDA"; }

// In <op>_binding.cpp: `implement` gives PyTorch's dispatcher the kernels of an op, `bind` gives
// Python what is called below one.
void implement_merge_states();
void implement_prefix_attention();
void implement_prompt_qkv();
void bind_prefix_attention(pybind11::module_& module);
void bind_prompt_concat(pybind11::module_& module);

}  // namespace cuda
}  // namespace softprompt_fast
