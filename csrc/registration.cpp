// SPDX-License-Identifier: Apache-2.0
// The module softprompt_fast._C: the CPU's kernels, and what is no op (build facts, CPU features).
// It does not link against torch and loads without; implement_ops() then finds the torch that is
// there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "checks.h"
#include "cpu/binding.h"
#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/parallel.h"
#include "torch_abi.h"

// setup.py passes these as string literals.
#if !defined(SOFTPROMPT_FAST_VERSION) || !defined(SOFTPROMPT_FAST_FLAGS) || \
    !defined(SOFTPROMPT_FAST_TORCH) || !defined(SOFTPROMPT_FAST_CUDA)
#error "build through setup.py: it defines the version, the compiler flags, and what was found"
#endif

namespace softprompt_fast {
namespace {

std::string compiler() {
#if defined(__clang__)
  return concat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#elif defined(__GNUC__)
  return concat("gcc ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#elif defined(_MSC_VER)
  return concat("msvc ", _MSC_VER);
#else
  return "unknown";
#endif
}

// No time and no path in it: the same sources and flags give the same binary.
std::map<std::string, std::string> build_info() {
  return {
      {"version", SOFTPROMPT_FAST_VERSION}, {"compiler", compiler()},
      {"flags", SOFTPROMPT_FAST_FLAGS},     {"cxx_standard", std::to_string(__cplusplus)},
      {"torch", SOFTPROMPT_FAST_TORCH},     {"cuda", SOFTPROMPT_FAST_CUDA},
  };
}

bool has_cpu_feature(const std::string& name) {
  const auto& features = cpu_features();
  const auto found = features.find(name);
  SOFTPROMPT_FAST_CHECK(found != features.end(), "name: unknown CPU feature '", name,
                        "'; cpu_features() lists those of this architecture");
  return found->second;
}

}  // namespace
}  // namespace softprompt_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of softprompt_fast; use it through softprompt_fast.backends.native.";
  m.def("build_info", &softprompt_fast::build_info,
        "Version, compiler, flags, C++ standard and torch seen at build time, as strings.");
  m.def("cpu_features", &softprompt_fast::cpu_features,
        "Instruction set name -> usable on this processor and operating system.");
  m.def("has_cpu_feature", &softprompt_fast::has_cpu_feature, pybind11::arg("name"),
        "Whether one instruction set is usable; ValueError for a name that is not listed.");
  m.def(
      "available_isas", &softprompt_fast::available_isas,
      "Instruction sets that the CPU kernels were built for and this processor runs, best first.");
  m.def(
      "isa", [] { return softprompt_fast::kernels().isa; },
      "The instruction set of the CPU kernels in use.");
  m.def("use_isa", &softprompt_fast::use_isa, pybind11::arg("name"),
        "Use another instruction set's kernels from now on; 'auto': the best.");
  m.def("workspace_allocations", &softprompt_fast::workspace_allocations,
        "How often the CPU kernels allocated scratch memory so far.");
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
        softprompt_fast::implement_merge_states();
        softprompt_fast::implement_prefix_attention();
        softprompt_fast::implement_prompt_concat();
      },
      pybind11::arg("folder"),
      "Give PyTorch, whose libraries lie in a folder, the kernels of the ops "
      "softprompt_fast::*_cpu. Once. RuntimeError: this PyTorch lacks what that takes.");
  softprompt_fast::bind_linear(m);
  softprompt_fast::bind_prefix_attention(m);
  softprompt_fast::bind_training(m);
}
