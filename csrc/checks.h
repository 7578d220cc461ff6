// SPDX-License-Identifier: Apache-2.0
// Argument checks for the bindings. Kernel headers take raw pointers and trust them, so whatever
// comes from Python is checked once, here, before a kernel sees it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace softprompt_fast {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace softprompt_fast

// Raises Python's ValueError (pybind11 maps std::invalid_argument to it). The message parts are
// evaluated only on failure.
#define SOFTPROMPT_FAST_CHECK(condition, ...)                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      throw std::invalid_argument(::softprompt_fast::concat(__VA_ARGS__)); \
    }                                                                      \
  } while (false)
