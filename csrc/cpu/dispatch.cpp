// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "../checks.h"
#include "features.h"

namespace softprompt_fast {
namespace {

std::vector<const Kernels*> available() {
  const auto& features = cpu_features();
  const auto has = [&](const char* name) {
    const auto found = features.find(name);
    return found != features.end() && found->second;
  };
  std::vector<const Kernels*> found;
  const auto add = [&](const Kernels* table, bool runs) {
    if (table != nullptr && runs) found.push_back(table);
  };
  add(avx512_kernels(), has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl") &&
                            has("fma") && has("f16c"));
  add(avx2_kernels(), has("avx2") && has("fma") && has("f16c"));
  add(neon_kernels(), has("neon"));
  add(portable_kernels(), true);
  return found;
}

const Kernels* choose(const std::string& name, const char* what) {
  const auto tables = available();
  if (name.empty() || name == "auto") return tables.front();
  std::string known = "auto";
  for (const Kernels* table : tables) {
    if (name == table->isa) return table;
    known += std::string(", ") + table->isa;
  }
  SOFTPROMPT_FAST_CHECK(false, what, ": expected one of ", known, " on this processor, found '",
                        name, "'");
  return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.push_back(table->isa);
  return names;
}

const Kernels& kernels() {
  const Kernels* table = in_use.load(std::memory_order_relaxed);
  if (table == nullptr) {
    const char* name = std::getenv("SOFTPROMPT_FAST_CPU_ISA");
    table = choose(name ? name : "", "environment SOFTPROMPT_FAST_CPU_ISA");
    in_use = table;
  }
  return *table;
}

void use_isa(const std::string& name) { in_use = choose(name, "isa"); }

}  // namespace softprompt_fast
