// SPDX-License-Identifier: Apache-2.0
// What the bindings know of the kernels: one function an op, in <op>.cu. They launch and return;
// none waits for the device or reads a value that lies there, so a stream may be capturing. No CUDA
// header.
#pragma once

#include <atomic>

#include "../merge_states.h"
#include "../prompt_concat.h"
#include "../prompt_qkv.h"
#include "prefix_attention_decode.h"

namespace softprompt_fast {
namespace cuda {

// Where a call's kernels go: a device and one of its streams (a cudaStream_t).
struct Queue {
  int device = 0;
  void* stream = nullptr;
};

// Each throws std::invalid_argument for what no kernel serves, std::runtime_error where CUDA fails.
void run_merge_states(const MergeStates& op, const Queue& queue);
void run_merge_states_backward(const MergeStatesGrad& op, const Queue& queue);
void run_prompt_concat(const PromptConcat& op, const Queue& queue);
void run_prompt_concat_backward(const PromptConcatGrad& op, const Queue& queue);
void run_prompt_qkv(const PromptQkv& op, const Queue& queue);
void run_head_norm(const HeadNorm& op, const Queue& queue);

// Bytes of shared memory that a block may have on a device, and that one of the kernel for heads of
// a size takes, whatever the rows.
int64_t shared_of_device(int device);
int64_t shared_of_prefix_attention(int head_dim, int v_dim);

// The plan of a call; its workspace and counters are the caller's, who asks for their sizes first.
DecodePlan plan_prefix_attention(const DecodeSizes& sizes, int head_dim, int v_dim, int device);
void run_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue);

// Whether large tiles are a warpgroup's products where a GPU of 9.0, and the build, have them.
// SOFTPROMPT_FAST_CUDA_WGMMA=0 at the first call: no.
std::atomic<bool>& use_wgmma();

// Which capture the queue's stream takes part in; 0: none.
uint64_t capture_of(const Queue& queue);

// Counters that are 0 before what the queue's stream does next, and never freed: a graph may hold
// them. Not from PyTorch's allocator: what lives on in the pool of a graph, PyTorch takes for a
// leak.
unsigned* new_counters(int64_t count, const Queue& queue);

}  // namespace cuda
}  // namespace softprompt_fast
