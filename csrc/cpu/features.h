// SPDX-License-Identifier: Apache-2.0
// What the processor AND the operating system support, asked at run time: one binary may be built
// on one machine and run on another, so nothing here looks at the compiler's target flags.
#pragma once

#include <map>
#include <string>

namespace softprompt_fast {

// Instruction set name -> usable. The names of the other architectures are left out, not false.
const std::map<std::string, bool>& cpu_features();

}  // namespace softprompt_fast
