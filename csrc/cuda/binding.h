// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CUDA kernels share.
#pragma once

#include <pybind11/pybind11.h>

#include "../checks.h"
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

// Where an op's tensors lie, and the current stream there.
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
void implement_prompt_concat();
void implement_prompt_qkv();
void bind_prefix_attention(pybind11::module_& module);

}  // namespace cuda
}  // namespace softprompt_fast
