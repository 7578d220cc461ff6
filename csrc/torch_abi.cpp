// SPDX-License-Identifier: Apache-2.0
#include "torch_abi.h"

#include <dlfcn.h>

#include <cstring>
#include <utility>

#include "checks.h"

namespace softprompt_fast {
namespace abi {
namespace {

using Error = int32_t;  // AOTITorchError: 0 is success
using Library = void*;  // TorchLibraryHandle
// "Built for 2.10": how later versions know which forms of values to pass.
constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

#if defined(__APPLE__)
constexpr const char* kSuffix = ".dylib";
#else
constexpr const char* kSuffix = ".so";
#endif

// PyTorch's functions, as its headers declare them.
struct Functions {
  Error (*sizes)(Handle, int64_t**);
  Error (*strides)(Handle, int64_t**);
  Error (*dim)(Handle, int64_t*);
  Error (*dtype)(Handle, int32_t*);
  Error (*layout)(Handle, int32_t*);
  Error (*device_type)(Handle, int32_t*);
  Error (*device_index)(Handle, int32_t*);
  Error (*const_data)(Handle, const void**);
  Error (*mutable_data)(Handle, void**);
  Error (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                         Handle*);
  Error (*delete_tensor)(Handle);
  Error (*library_init_impl)(const char*, const char*, const char*, uint32_t, Library*);
  Error (*library_impl)(Library, const char*, Kernel, uint64_t);
  Error (*num_threads)(uint32_t*);
  Error (*current_stream)(int32_t, void**);  // null where PyTorch has no CUDA
};

// Codes that PyTorch says once.
struct Codes {
  int32_t dtypes[5];  // of DType
  int32_t int32, int64, strided, cpu;
};

Functions torch = {};
Codes codes = {};

void check(Error error, const char* what) {
  if (error != 0) throw std::runtime_error(concat("PyTorch's ", what, " failed"));
}

void* opened(const std::string& folder, const char* name) {
  return dlopen((folder + "/" + name + kSuffix).c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw std::runtime_error(concat("this PyTorch has no function ", name, ", which 2.10 has"));
  }
}

int32_t code(void* library, const char* name) {
  int32_t (*function)() = nullptr;
  find(library, name, function);
  return function();
}

const char* name_of(int32_t dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "float8_e4m3fn"};
  for (int i = 0; i < 5; ++i) {
    if (dtype == codes.dtypes[i]) return kNames[i];
  }
  return dtype == codes.int32 ? "int32" : dtype == codes.int64 ? "int64" : "another dtype";
}

// `written`: its memory is, so a copy-on-write view has to be copied first.
View view_of(Handle handle, bool written) {
  View view;
  int32_t layout = 0;
  check(torch.layout(handle, &layout), "get_layout");
  SOFTPROMPT_FAST_CHECK(layout == codes.strided, "expected strided tensors");
  int64_t *size = nullptr, *stride = nullptr;
  check(torch.dim(handle, &view.dimensions), "get_dim");
  check(torch.sizes(handle, &size), "get_sizes");
  check(torch.strides(handle, &stride), "get_strides");
  check(torch.dtype(handle, &view.dtype), "get_dtype");
  check(torch.device_type(handle, &view.device_type), "get_device_type");
  check(torch.device_index(handle, &view.device), "get_device_index");
  if (written) {
    check(torch.mutable_data(handle, &view.data), "get_mutable_data_ptr");
  } else {
    const void* data = nullptr;
    check(torch.const_data(handle, &data), "get_const_data_ptr");
    view.data = const_cast<void*>(data);
  }
  view.size = size;
  view.stride = stride;
  view.given = true;
  // PyTorch's zero tensors have none.
  SOFTPROMPT_FAST_CHECK(view.data != nullptr || view.numel() == 0,
                        "expected a tensor with memory, found ", view.describe(), " without");
  return view;
}

}  // namespace

std::exception_ptr& refusal() {
  thread_local std::exception_ptr last;
  return last;
}

void load(const std::string& folder) {
  void* library = opened(folder, "libtorch_cpu");
  if (library == nullptr) {
    throw std::runtime_error(concat("PyTorch has loaded no libtorch_cpu", kSuffix, " of its own"));
  }
  Functions found = {};
  find(library, "aoti_torch_get_sizes", found.sizes);
  find(library, "aoti_torch_get_strides", found.strides);
  find(library, "aoti_torch_get_dim", found.dim);
  find(library, "aoti_torch_get_dtype", found.dtype);
  find(library, "aoti_torch_get_layout", found.layout);
  find(library, "aoti_torch_get_device_type", found.device_type);
  find(library, "aoti_torch_get_device_index", found.device_index);
  find(library, "torch_get_const_data_ptr", found.const_data);
  find(library, "torch_get_mutable_data_ptr", found.mutable_data);
  find(library, "aoti_torch_empty_strided", found.empty_strided);
  find(library, "aoti_torch_delete_tensor_object", found.delete_tensor);
  find(library, "aoti_torch_library_init_impl", found.library_init_impl);
  find(library, "torch_library_impl", found.library_impl);
  find(library, "torch_get_num_threads", found.num_threads);
  if (void* cuda = opened(folder, "libtorch_cuda")) {
    find(cuda, "aoti_torch_get_current_cuda_stream", found.current_stream);
  }
  codes = {{code(library, "aoti_torch_dtype_float32"), code(library, "aoti_torch_dtype_bfloat16"),
            code(library, "aoti_torch_dtype_float16"), code(library, "aoti_torch_dtype_int8"),
            code(library, "aoti_torch_dtype_float8_e4m3fn")},
           code(library, "aoti_torch_dtype_int32"),
           code(library, "aoti_torch_dtype_int64"),
           code(library, "aoti_torch_layout_strided"),
           code(library, "aoti_torch_device_type_cpu")};
  torch = found;
}

void implement(const char* name, const char* key, Kernel kernel) {
  Library library = nullptr;  // never deleted, which would take the kernel away again
  check(torch.library_init_impl("softprompt_fast", key, "torch_abi.cpp", __LINE__, &library),
        "library");
  check(torch.library_impl(library, name, kernel, kVersion), "library_impl");
}

int threads() {
  uint32_t count = 1;
  check(torch.num_threads(&count), "get_num_threads");
  return static_cast<int>(count);
}

void* stream(int device) {
  void* found = nullptr;
  if (torch.current_stream == nullptr) throw std::runtime_error("this PyTorch has no CUDA");
  check(torch.current_stream(device, &found), "current_stream");
  return found;
}

// -- tensors --------------------------------------------------------------------------------------

bool View::is_cpu() const { return device_type == codes.cpu; }

int64_t View::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dimensions; ++i) count *= size[i];
  return count;
}

bool View::is_dense() const {
  int64_t expected = 1;
  for (int64_t i = dimensions - 1; i >= 0; --i) {
    if (size[i] > 1 && stride[i] != expected) return numel() == 0;
    expected *= size[i];
  }
  return true;
}

bool View::has_shape(std::initializer_list<int64_t> shape) const {
  if (dimensions != static_cast<int64_t>(shape.size())) return false;
  return std::memcmp(size, shape.begin(), shape.size() * sizeof(int64_t)) == 0;
}

std::string View::describe() const {
  if (!given) return "None";
  std::string shape;
  for (int64_t i = 0; i < dimensions; ++i) shape += concat(i > 0 ? ", " : "", size[i]);
  return concat(name_of(dtype), " [", shape, "] on ", is_cpu() ? "cpu" : "a device");
}

NewTensor::NewTensor(const View& other, int32_t dtype, std::initializer_list<int64_t> shape,
                     std::initializer_list<int64_t> strides) {
  check(torch.empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.begin(),
                            dtype, other.device_type, other.device, &handle_),
        "empty_strided");
}

NewTensor::NewTensor(const View& other) {
  int64_t expected = 1;
  uint64_t done = 0;  // a bit a dimension, from the innermost on
  for (int64_t n = 0; n < other.dimensions; ++n) {
    int64_t inner = -1;
    for (int64_t i = 0; i < other.dimensions; ++i) {
      if ((done >> i) & 1) continue;
      if (other.size[i] <= 1) {
        done |= uint64_t{1} << i;
      } else if (inner < 0 || other.stride[i] < other.stride[inner]) {
        inner = i;
      }
    }
    if (inner < 0) break;
    SOFTPROMPT_FAST_CHECK(other.stride[inner] == expected, "expected memory without gaps, found ",
                          other.describe(), " with strides apart");
    expected *= other.size[inner];
    done |= uint64_t{1} << inner;
  }
  check(torch.empty_strided(other.dimensions, other.size, other.stride, other.dtype,
                            other.device_type, other.device, &handle_),
        "empty_strided");
}

NewTensor::~NewTensor() {
  if (handle_ != nullptr) torch.delete_tensor(handle_);
}

View NewTensor::view() const { return view_of(handle_, true); }

Value NewTensor::release() {
  return reinterpret_cast<Value>(
      new Value(reinterpret_cast<Value>(std::exchange(handle_, nullptr))));
}

// -- arguments ------------------------------------------------------------------------------------

Arguments::Arguments(const char* kinds, const Value* stack, uint64_t inputs) {
  // Everything is taken over before anything can throw: what is not would leak.
  uint64_t i = 0;
  for (const char* kind = kinds; *kind && i < inputs && i < kMost; ++kind, ++i) {
    values_[i] = stack[i];
    bool given = true;
    if (*kind == '?') {
      ++kind;
      auto* box = reinterpret_cast<Value*>(stack[i]);
      given = box != nullptr;
      values_[i] = given ? *box : 0;
      delete box;
    }
    const bool tensor = *kind == 'T' || *kind == 'R';
    present_ |= uint32_t{given} << i;
    tensors_ |= uint32_t{given && tensor} << i;
    written_ |= uint32_t{*kind == 'R'} << i;
  }
}

Arguments::~Arguments() {
  for (int i = 0; tensors_ >> i; ++i) {
    if ((tensors_ >> i) & 1) torch.delete_tensor(reinterpret_cast<Handle>(values_[i]));
  }
}

View Arguments::tensor(int i) const {
  return has(i) ? view_of(reinterpret_cast<Handle>(values_[i]), (written_ >> i) & 1) : View{};
}

double Arguments::number(int i) const {
  double value;
  std::memcpy(&value, &values_[i], sizeof(value));
  return value;
}

// -- what kernels read ----------------------------------------------------------------------------

DType dtype_of(const char* name, const View& view) {
  for (int i = 0; i < 5; ++i) {
    if (view.dtype == codes.dtypes[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument(concat(name, ": no kernel reads ", view.describe()));
}

int32_t torch_dtype(DType dtype) { return codes.dtypes[static_cast<int>(dtype)]; }

bool is_int64(const View& view) { return view.dtype == codes.int64; }

Tensor as_tensor(const char* name, const View& view, int64_t dimensions) {
  Tensor tensor;
  if (!view) return tensor;
  const int64_t lead = dimensions > view.dimensions ? dimensions - view.dimensions : 0;
  SOFTPROMPT_FAST_CHECK(lead + view.dimensions <= 4, name,
                        ": expected at most 4 dimensions, found ", view.describe());
  tensor.data = view.data;
  tensor.dtype = dtype_of(name, view);
  for (int64_t i = 0; i < view.dimensions; ++i) tensor.stride[lead + i] = view.stride[i];
  return tensor;
}

Index as_index(const char* name, const View& view, int64_t size, const View& other) {
  Index index;
  if (!view) return index;
  index.wide = view.dtype == codes.int64;
  SOFTPROMPT_FAST_CHECK(
      view.has_shape({size}) && view.beside(other) && (index.wide || view.dtype == codes.int32),
      name, ": expected int32 or int64 [", size, "] on the device of the others, found ",
      view.describe());
  SOFTPROMPT_FAST_CHECK(view.is_dense(), name, ": expected dense numbers, found a stride of ",
                        view.stride[0]);
  index.data = view.data;
  index.size = size;
  return index;
}

}  // namespace abi
}  // namespace softprompt_fast
