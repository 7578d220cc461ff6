// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CUDA kernels share, on top of ../arguments.h.
#pragma once

#include "../arguments.h"
#include "kernels.h"

namespace softprompt_fast {
namespace cuda {

// (device index, cudaStream_t as a number): where a call's tensors lie, and its stream there.
inline Queue as_queue(pybind11::handle given) {
  PyObject* tuple = as_tuple("queue", given, 2, "a device and a stream");
  const int64_t device = as_number("queue", PyTuple_GET_ITEM(tuple, 0));
  SOFTPROMPT_FAST_CHECK(device >= 0 && device < 1024, "queue: expected a device, found ", device);
  return {static_cast<int>(device),
          reinterpret_cast<void*>(as_number("queue", PyTuple_GET_ITEM(tuple, 1)))};
}

// One function per op, in <op>_binding.cpp.
void bind_merge_states(pybind11::module_& module);
void bind_prefix_attention(pybind11::module_& module);
void bind_prompt_concat(pybind11::module_& module);
void bind_prompt_qkv(pybind11::module_& module);

}  // namespace cuda
}  // namespace softprompt_fast
