// SPDX-License-Identifier: Apache-2.0
// The module softprompt_fast._cuda: the CUDA kernels, or what the emulator makes of them. It links
// against no torch; the CUDA runtime is inside it and uses the context that torch uses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "binding.h"

// setup.py and tests/cuda_emulated.py pass these as string literals. SOFTPROMPT_FAST_CUDA_ARCHS:
// what the kernels are built for, "emulated" without a device.
#if !defined(SOFTPROMPT_FAST_VERSION) || !defined(SOFTPROMPT_FAST_CUDA_ARCHS)
#error "build through setup.py: it defines the version and the architectures"
#endif

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of softprompt_fast; use them through softprompt_fast.backends.cuda.";
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{{"version", SOFTPROMPT_FAST_VERSION},
                                                  {"architectures", SOFTPROMPT_FAST_CUDA_ARCHS}};
      },
      "Version and the architectures that the kernels were built for, as strings.");
  m.def(
      "raise_refusal",
      [] {
        if (const auto last = softprompt_fast::abi::refusal()) std::rethrow_exception(last);
      },
      "Raise why the last op called in this thread that did not serve its call did not: "
      "ValueError or IndexError, its arguments; RuntimeError, something else failed.");
  m.def(
      "implement_ops",
      [](const std::string& folder) {
        softprompt_fast::abi::load(folder);
        softprompt_fast::cuda::implement_merge_states();
        softprompt_fast::cuda::implement_prefix_attention();
        softprompt_fast::cuda::implement_prompt_concat();
        softprompt_fast::cuda::implement_prompt_qkv();
      },
      pybind11::arg("folder"),
      "Give PyTorch, whose libraries lie in a folder, the kernels of the ops "
      "softprompt_fast::*_cuda. Once. RuntimeError: this PyTorch lacks what that takes.");
  softprompt_fast::cuda::bind_prefix_attention(m);
}
