// Reads and checks tensors through their Python attributes: all that memory safety needs.
#include "tensors.h"

namespace unigendet {
namespace {

constexpr int kMaxThreads = 4096;

std::vector<int64_t> integers(const py::handle& tuple) {
  std::vector<int64_t> values;
  for (const py::handle& value : tuple) values.push_back(py::cast<int64_t>(value));
  return values;
}

}  // namespace

void reject(const std::string& name, const std::string& is, const std::string& need) {
  throw py::value_error(name + " is " + is + "; it must be " + need);
}

View view(const std::string& name, const py::handle& object) {
  const py::module_ torch = py::module_::import("torch");
  if (!py::isinstance(object, torch.attr("Tensor"))) {
    reject(name, py::cast<std::string>(py::str(py::type::handle_of(object).attr("__name__"))), "a tensor");
  }
  View v;
  v.name = name;
  try {
    if (!object.attr("layout").is(torch.attr("strided")) || py::cast<bool>(object.attr("is_neg")()) ||
        py::cast<bool>(object.attr("is_conj")())) {
      reject(name, "a sparse or lazily negated tensor", "a plain one");
    }
    v.dtype = py::cast<std::string>(py::str(object.attr("dtype")));
    v.device_type = py::cast<std::string>(object.attr("device").attr("type"));
    const py::object index = object.attr("device").attr("index");
    v.device_index = index.is_none() ? -1 : py::cast<int64_t>(index);
    v.shape = integers(object.attr("shape"));
    v.stride = integers(object.attr("stride")());
    v.item_size = py::cast<int64_t>(object.attr("element_size")());
    if (v.device_type != "cpu" && v.device_type != "cuda") reject(name, v.text(), "on the CPU or a CUDA device");
    v.data = py::cast<uintptr_t>(object.attr("data_ptr")());
    bool fits = v.stride.size() == v.shape.size();
    int64_t last = 0;
    for (size_t i = 0; fits && i < v.shape.size(); ++i) {
      int64_t step = 0;
      fits = v.shape[i] >= 0 && v.stride[i] >= 0 && multiply(v.numel, v.shape[i], &v.numel) &&
             (v.shape[i] <= 1 || (multiply(v.shape[i] - 1, v.stride[i], &step) &&
                                  !__builtin_add_overflow(last, step, &last)));
    }
    int64_t bytes = 0, offset = 0;
    v.extent = v.numel == 0 ? 0 : last + 1;
    fits = fits && multiply(v.extent, v.item_size, &bytes) &&
           multiply(py::cast<int64_t>(object.attr("storage_offset")()), v.item_size, &offset) &&
           !__builtin_add_overflow(offset, bytes, &offset);
    const py::object storage = object.attr("untyped_storage")();
    if (!fits || (v.extent > 0 && (v.data == 0 || offset > py::cast<int64_t>(storage.attr("nbytes")())))) {
      reject(name, v.text() + " whose memory is not there", "one that owns its memory");
    }
    if (v.extent > 0 && v.data % static_cast<uintptr_t>(v.item_size) != 0) {
      reject(name, v.text() + " at an address that is no multiple of its items' size", "aligned");
    }
  } catch (const py::error_already_set& error) {  // of a tensor without strides, memory or sizes
    if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
    reject(name, std::string("a tensor that cannot be read (") + error.what() + ")", "a plain one");
  } catch (const py::cast_error&) {
    reject(name, "a tensor whose sizes are no integers", "a plain one");
  }
  return v;
}

Dtype dtype_of(const View& v) {
  if (v.dtype == "torch.float32") return Dtype::float32;
  if (v.dtype == "torch.bfloat16") return Dtype::bfloat16;
  if (v.dtype == "torch.float16") return Dtype::float16;
  reject(v.name, v.text(), "of dtype torch.float32, torch.bfloat16 or torch.float16");
}

View typed(const std::string& name, const py::handle& object, const char* dtype, size_t rank, const View* like) {
  View v = view(name, object);
  if (v.dtype != dtype || v.shape.size() != rank) {
    reject(name, v.text(), std::string("a ") + dtype + " tensor of rank " + std::to_string(rank));
  }
  if (like != nullptr && (v.device_type != like->device_type || v.device_index != like->device_index)) {
    reject(name, v.text(), "on the device of " + like->name);
  }
  if (!v.is_contiguous()) reject(name, v.text() + ", strided", "contiguous");
  return v;
}

View workspace(const std::string& name, const py::handle& object, const char* dtype, int64_t numel, const View& like) {
  View v = typed(name, object, dtype, 1, &like);
  if (v.numel != numel) reject(name, v.text(), "of " + std::to_string(numel) + " elements");
  return v;
}

void keep_apart(const std::vector<View>& outputs, const std::vector<View>& inputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    for (const View& input : inputs) {
      if (outputs[i].overlaps(input)) reject(outputs[i].name, "in the memory of " + input.name, "apart from it");
    }
    for (size_t j = 0; j < i; ++j) {
      if (outputs[i].overlaps(outputs[j])) reject(outputs[i].name, "in the memory of " + outputs[j].name, "apart from it");
    }
  }
}

int32_t check_threads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) {
    reject("num_threads", std::to_string(num_threads), "from 1 to " + std::to_string(kMaxThreads));
  }
  return static_cast<int32_t>(num_threads);
}

const CpuKernels& kernels_of(const std::optional<std::string>& isa) {
  for (const CpuKernels& kernels : kCpuKernels) {
    if (isa ? *isa == kernels.isa : kernels.supported()) {
      if (kernels.supported()) return kernels;
      reject("isa", *isa, "one that this processor has");
    }
  }
  reject("isa", *isa, "one that is built");
}

Scratch allocate_scratch(int64_t floats) {
  if (floats == 0) return {nullptr, std::free};
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);  // a multiple of 64
  Scratch scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), std::free);
  if (scratch == nullptr) throw std::bad_alloc();
  return scratch;
}

std::string sizes_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

View input(const std::string& name, const py::handle& object, size_t rank) {
  View v = view(name, object);
  dtype_of(v);
  if (v.device_type != "cpu") reject(name, v.text(), "on cpu");
  if (v.shape.size() != rank) reject(name, v.text(), "of rank " + std::to_string(rank));
  if (v.numel > 0 && v.shape.back() > 1 && v.stride.back() != 1) reject(name, v.text() + ", strided", "of contiguous rows");
  return v;
}

void check_shape(const View& v, const std::vector<int64_t>& shape) {
  if (v.shape != shape) reject(v.name, v.text(), "of shape " + sizes_text(shape));
}

View input_like(const std::string& name, const py::handle& object, const std::vector<int64_t>& shape, const View& like) {
  View v = input(name, object, shape.size());
  if (v.dtype != like.dtype) reject(name, v.text(), "of the dtype of " + like.name);
  check_shape(v, shape);
  return v;
}

View exactly(const std::string& name, const py::handle& object, const std::string& dtype,
             const std::vector<int64_t>& shape, const View& like) {
  View v = typed(name, object, dtype.c_str(), shape.size(), &like);
  check_shape(v, shape);
  return v;
}

Heads heads_of(const View& v) {
  return {v.as<void>(), v.shape[0] > 1 ? v.stride[0] : 0, v.shape[1] > 1 ? v.stride[1] : 0};
}

View indices(const std::string& name, const py::handle& object, int64_t count, int64_t limit, const View& like) {
  View v = workspace(name, object, "torch.int64", count, like);
  const int64_t* numbers = v.as<const int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] < 0 || numbers[i] >= limit) {
      reject(name, "one with " + std::to_string(numbers[i]), "of numbers from 0 to " + std::to_string(limit - 1));
    }
  }
  return v;
}

}  // namespace unigendet
