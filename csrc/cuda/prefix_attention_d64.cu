// SPDX-License-Identifier: Apache-2.0
#include "prefix_attention_launch.cuh"

namespace softprompt_fast {
namespace cuda {

template void launch_prefix_attention<64>(const PrefixAttentionDecode&, const Queue&);

}  // namespace cuda
}  // namespace softprompt_fast
