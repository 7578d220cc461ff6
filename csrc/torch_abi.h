// SPDX-License-Identifier: Apache-2.0
// Ops as PyTorch's dispatcher calls them, through its stable C ABI
// (torch/csrc/inductor/aoti_torch/c, torch/csrc/stable/c; all of it from 2.10 on). The functions
// are found at run time in the libtorch that Python has loaded: building needs no torch, and one
// build serves every version that has them.
//
// A boxed kernel gets a stack of 64-bit values, one an argument, and leaves one a result. A value
// is a number's own bits, or a tensor's handle, which the receiver owns; of an optional one it is
// 0, or the address of such a value, which the receiver frees.
//
// No exception may pass through PyTorch, whose C++ runtime can be another one. So our ops say by
// their results whether they served a call, and refusal() keeps why not.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>

#include "tensor.h"

namespace softprompt_fast {
namespace abi {

using Value = uint64_t;
using Handle = void*;  // AtenTensorHandle
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

// What the last call of this thread that was not served threw; null: there was none.
std::exception_ptr& refusal();

// A kernel of `run`, from a stack of arguments to one of results; where it throws, all results are
// none, or false.
template <void (*run)(Value* stack, uint64_t inputs)>
void boxed(Value* stack, uint64_t inputs, uint64_t outputs) {
  try {
    run(stack, inputs);
    return;
  } catch (...) {
    refusal() = std::current_exception();
  }
  for (uint64_t i = 0; i < outputs; ++i) stack[i] = 0;
}

// Finds PyTorch's functions. `folder`: where its libraries lie. std::runtime_error says what is
// missing.
void load(const std::string& folder);

// Makes `kernel` the implementation of softprompt_fast::<name>, which is defined elsewhere, for a
// dispatch key ("CPU", "CUDA") and the life of the process.
void implement(const char* name, const char* key, Kernel kernel);

int threads();             // torch.get_num_threads()
void* stream(int device);  // the current one of a CUDA device, a cudaStream_t

// A tensor that something else keeps alive. Sizes and strides are its own.
struct View {
  void* data = nullptr;
  int64_t dimensions = 0;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;  // PyTorch's codes
  bool given = false;

  explicit operator bool() const { return given; }
  bool is_cpu() const;
  int64_t numel() const;
  bool is_dense() const;  // in the order of its dimensions
  bool beside(const View& other) const {
    return device_type == other.device_type && device == other.device;
  }
  bool has_shape(std::initializer_list<int64_t> shape) const;
  std::string describe() const;  // such as "float32 [2, 3] on cpu"
};

// A new tensor; release() makes it a result, of an optional type.
class NewTensor {
 public:
  // Uninitialised, on the device of `other`. std::runtime_error where there is no memory.
  NewTensor(const View& other, int32_t dtype, std::initializer_list<int64_t> shape,
            std::initializer_list<int64_t> strides);
  // Like torch.empty_like of a tensor whose elements fill their memory, in whatever order of its
  // dimensions: with its strides. std::invalid_argument for another tensor.
  explicit NewTensor(const View& other);
  ~NewTensor();
  NewTensor(const NewTensor&) = delete;
  NewTensor& operator=(const NewTensor&) = delete;

  View view() const;
  Value release();

 private:
  Handle handle_ = nullptr;
};

// An op's arguments, taken over from the stack. `kinds` has a letter for each: T a tensor, R one
// that the kernel writes, d a double, i an integer, b a flag; one after "?" is optional.
class Arguments {
 public:
  Arguments(const char* kinds, const Value* stack, uint64_t inputs);
  ~Arguments();
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  bool has(int i) const { return (present_ >> i) & 1; }
  View tensor(int i) const;  // not given: an empty view
  double number(int i) const;
  int64_t integer(int i) const { return static_cast<int64_t>(values_[i]); }
  bool flag(int i) const { return (values_[i] & 0xff) != 0; }

 private:
  static constexpr int kMost = 32;
  Value values_[kMost];
  uint32_t present_ = 0, tensors_ = 0, written_ = 0;
};

// How kernels see tensors. Like all checks of the ops, these throw std::invalid_argument.

DType dtype_of(const char* name, const View& view);
int32_t torch_dtype(DType dtype);
bool is_int64(const View& view);

// With further dimensions of stride 0 in front, up to `dimensions`.
Tensor as_tensor(const char* name, const View& view, int64_t dimensions = 0);

// Dense int32 or int64 numbers on the device of `other`; not given: none.
Index as_index(const char* name, const View& view, int64_t size, const View& other);

}  // namespace abi
}  // namespace softprompt_fast
