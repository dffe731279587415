// What the bindings share: tensors as Python objects, read and checked. What does not fit raises ValueError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "params.h"

namespace unigendet {

namespace py = pybind11;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// Raises "{name} is {is}; it must be {need}".
[[noreturn]] void reject(const std::string& name, const std::string& is, const std::string& need);

// A tensor as kernels see it. Strides are in elements; those of dimensions of size 1 and less are not used.
struct View {
  std::string name, dtype, device_type;
  int64_t device_index = -1;
  std::vector<int64_t> shape, stride;
  uintptr_t data = 0;
  int64_t item_size = 0;
  int64_t numel = 1;
  int64_t extent = 0;  // elements from the first to the last, both counted

  std::string text() const {
    std::string sizes;
    for (int64_t n : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(n);
    return "a " + dtype + " tensor of shape [" + sizes + "] on " + device_type;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    if (numel == 0) return true;
    for (size_t i = shape.size(); i-- > 0;) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  bool overlaps(const View& other) const {
    const auto end = [](const View& v) { return v.data + static_cast<uintptr_t>(v.extent * v.item_size); };
    return extent > 0 && other.extent > 0 && data < end(other) && other.data < end(*this);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// Whether the product fits.
inline bool multiply(int64_t a, int64_t b, int64_t* product) { return !__builtin_mul_overflow(a, b, product); }

// Reads and checks what is common to all tensors; `name` is for messages.
View view(const std::string& name, const py::handle& object);

Dtype dtype_of(const View& v);

// Contiguous, on the device of `like` if that is not null, of the dtype and rank that are meant.
View typed(const std::string& name, const py::handle& object, const char* dtype, size_t rank, const View* like);

// The same, of rank 1 and of this many elements.
View workspace(const std::string& name, const py::handle& object, const char* dtype, int64_t numel, const View& like);

// No output may lie in the memory of an input or of another output.
void keep_apart(const std::vector<View>& outputs, const std::vector<View>& inputs);

// An input of float32, bfloat16 or float16 on the CPU whose last dimension is contiguous, of any shape of this rank.
View input(const std::string& name, const py::handle& object, size_t rank);

// The same, of this shape and of the dtype of `like`.
View input_like(const std::string& name, const py::handle& object, const std::vector<int64_t>& shape, const View& like);

void check_shape(const View& v, const std::vector<int64_t>& shape);

// A contiguous tensor on the CPU of this dtype and shape.
View exactly(const std::string& name, const py::handle& object, const std::string& dtype,
             const std::vector<int64_t>& shape, const View& like);

// int64 numbers, each from 0 to `limit` - 1.
View indices(const std::string& name, const py::handle& object, int64_t count, int64_t limit, const View& like);

// A tensor [rows, heads, head_dim] as kernels take it.
Heads heads_of(const View& v);

int32_t check_threads(int64_t num_threads);

// The kernels of an instruction set by its name; the best one that this processor has for None.
const CpuKernels& kernels_of(const std::optional<std::string>& isa);

// Floats for kernels to work in, 64-byte aligned; null for none.
using Scratch = std::unique_ptr<float, void (*)(void*)>;
Scratch allocate_scratch(int64_t floats);

// The functions that each file of bindings adds to the module.
void define_alignment_loss(py::module_& module);
void define_attention(py::module_& module);
void define_rows(py::module_& module);

}  // namespace unigendet
