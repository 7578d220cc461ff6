// SPDX-License-Identifier: Apache-2.0
// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace softprompt_fast {

// The instruction sets that this binary holds and this processor can run, best first.
std::vector<std::string> available_isas();

// The kernels in use: the best available, or those that the environment variable
// SOFTPROMPT_FAST_CPU_ISA names at the first call. Throws std::invalid_argument for a name that is
// not available.
const Kernels& kernels();

// Use another instruction set's kernels from now on ("auto": the best); for tests.
void use_isa(const std::string& name);

}  // namespace softprompt_fast
