// The alignment loss as Python functions: what its kernels take, checked.
#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "params.h"
#include "tensors.h"

#ifdef UNIGENDET_CUDA
#include "alignment_loss_cuda.h"
#endif

namespace unigendet {
namespace {

View matrix(const std::string& name, const py::handle& object, const char* device_type) {
  View v = view(name, object);
  dtype_of(v);
  if (v.device_type != device_type) reject(name, v.text(), std::string("on ") + device_type);
  if (v.shape.size() != 2 || v.shape[0] < 1 || v.shape[1] < 1 || v.shape[0] > kMaxInt32 || v.shape[1] > kMaxInt32) {
    reject(name, v.text(), "of shape [rows, columns], both at least 1 and below 2^31");
  }
  if (v.shape[1] > 1 && v.stride[1] != 1) reject(name, v.text() + ", strided along its columns", "of contiguous rows");
  return v;
}

// The table's images, with where their rows begin.
std::vector<Image> images_of(const py::handle& table, int64_t student_rows, int64_t teacher_rows) {
  const View v = typed("table", table, "torch.int64", 1, nullptr);
  if (v.device_type != "cpu" || v.numel == 0 || v.numel % 4 != 0 || v.numel / 4 > kMaxInt32) {
    reject("table", v.text(), "on cpu, with four numbers per image");
  }
  const int64_t* sizes = v.as<const int64_t>();
  std::vector<Image> images;
  int64_t student = 0, teacher = 0;
  const auto advance = [](int64_t h, int64_t w, int64_t* rows) {
    int64_t product = 0;
    return h > 0 && w > 0 && h <= kMaxInt32 && w <= kMaxInt32 && multiply(h, w, &product) &&
           product <= kMaxInt32 - *rows && (*rows += product) > 0;
  };
  for (int64_t i = 0; i < v.numel / 4; ++i) {
    const int64_t size[4] = {sizes[4 * i], sizes[4 * i + 1], sizes[4 * i + 2], sizes[4 * i + 3]};
    const int64_t student_row = student, teacher_row = teacher;
    if (!advance(size[0], size[1], &student) || !advance(size[2], size[3], &teacher)) {
      reject("table", "that of sizes that are not positive or of 2^31 rows and more", "of positive sizes");
    }
    images.push_back({static_cast<int32_t>(size[0]), static_cast<int32_t>(size[1]), static_cast<int32_t>(size[2]),
                      static_cast<int32_t>(size[3]), static_cast<int32_t>(student_row),
                      static_cast<int32_t>(teacher_row)});
  }
  if (student != student_rows || teacher != teacher_rows) {
    reject("table", "that of " + std::to_string(student) + " student and " + std::to_string(teacher) + " teacher rows",
           "that of " + std::to_string(student_rows) + " and " + std::to_string(teacher_rows));
  }
  return images;
}

// Whatever both builds take, checked; the views live as long as the call.
struct AlignmentLossCall {
  AlignmentLossParams params{};
  std::vector<Image> images;
  std::vector<View> inputs, outputs;

  AlignmentLossCall(const char* device_type, const py::handle& student, const py::handle& teacher,
                    const py::handle& table, const py::handle& normalizer, const py::handle& token_weights, double weight,
                    const py::handle& loss, const py::handle& means, const py::handle& dstudent,
                    const py::handle& dteacher, const py::handle& distances, const py::handle& coefficients,
                    std::pair<bool, bool> unit_gradients) {
    const View s = matrix("student", student, device_type), t = matrix("teacher", teacher, device_type);
    if (t.shape[1] != s.shape[1]) reject("teacher", t.text(), "of " + std::to_string(s.shape[1]) + " columns");
    if (t.device_index != s.device_index) reject("teacher", t.text(), "on the device of student");
    const int64_t rows = s.shape[0], columns = s.shape[1];
    images = images_of(table, rows, t.shape[0]);
    inputs = {s, t};
    params.student = {s.as<void>(), s.stride[0], dtype_of(s)};
    params.teacher = {t.as<void>(), t.stride[0], dtype_of(t)};
    params.student_rows = static_cast<int32_t>(rows);
    params.teacher_rows = static_cast<int32_t>(t.shape[0]);
    params.columns = static_cast<int32_t>(columns);
    params.images = images.data();
    params.num_images = static_cast<int32_t>(images.size());
    if (!normalizer.is_none()) {
      inputs.push_back(typed("normalizer", normalizer, "torch.float32", 0, &s));
      params.normalizer = inputs.back().as<float>();
    }
    if (!token_weights.is_none()) {
      inputs.push_back(workspace("token_weights", token_weights, "torch.float32", rows, s));
      params.token_weights = inputs.back().as<float>();
    }
    params.weight = static_cast<float>(weight);
    params.unit_dstudent = unit_gradients.first;
    params.unit_dteacher = unit_gradients.second;
    params.loss = output(typed("loss", loss, "torch.float32", 0, &s)).as<float>();
    params.means = output(workspace("means", means, "torch.float32", params.num_images, s)).as<float>();
    params.dstudent = gradient("dstudent", dstudent, s);
    params.dteacher = gradient("dteacher", dteacher, t);
    params.distances = output(workspace("distances", distances, "torch.float32", rows, s)).as<float>();
    if (params.dteacher != nullptr) {
      params.coefficients =
          output(workspace("coefficients", coefficients, "torch.float32", 2 * rows, s)).as<float>();
    }
  }

  const View& output(View v) {
    outputs.push_back(std::move(v));
    return outputs.back();
  }

  void* gradient(const std::string& name, const py::handle& object, const View& like) {
    if (object.is_none()) return nullptr;
    const View& v = output(typed(name, object, like.dtype.c_str(), 2, &like));
    if (v.shape != like.shape) reject(name, v.text(), "of the shape of " + like.name);
    return v.as<void>();
  }
};

void alignment_loss_cpu(const py::handle& student, const py::handle& teacher, const py::handle& table,
                        const py::handle& normalizer, const py::handle& token_weights, double weight,
                        const py::handle& loss, const py::handle& means, const py::handle& dstudent,
                        const py::handle& dteacher, const py::handle& distances, const py::handle& coefficients,
                        std::pair<bool, bool> unit_gradients, int64_t num_threads,
                        const std::optional<std::string>& isa) {
  AlignmentLossCall call("cpu", student, teacher, table, normalizer, token_weights, weight, loss, means, dstudent,
                         dteacher, distances, coefficients, unit_gradients);
  keep_apart(call.outputs, call.inputs);
  AlignmentLossParams& p = call.params;
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  const Scratch scratch = allocate_scratch(p.num_threads * scratch_floats(p.columns));
  p.scratch = scratch.get();
  const py::gil_scoped_release release;
  kernels.alignment_loss(p);
}

// The scale kernels' arguments; factor is one float32 number, out may be gradient itself.
ScaleParams scale_params(const char* device_type, const py::handle& gradient, const py::handle& factor,
                         const py::handle& out) {
  const View from = view("gradient", gradient);
  const View to = typed("out", out, from.dtype.c_str(), from.shape.size(), &from);
  const View by = typed("factor", factor, "torch.float32", 0, &from);
  if (from.device_type != device_type) reject("gradient", from.text(), std::string("on ") + device_type);
  if (!from.is_contiguous()) reject("gradient", from.text() + ", strided", "contiguous");
  if (to.shape != from.shape) reject("out", to.text(), "of the shape of gradient");
  if (to.data != from.data) keep_apart({to}, {from});
  keep_apart({to}, {by});
  return {from.as<void>(), to.as<void>(), by.as<float>(), from.numel, dtype_of(from), 1, nullptr};
}

void scale_cpu(const py::handle& gradient, const py::handle& factor, const py::handle& out, int64_t num_threads,
               const std::optional<std::string>& isa) {
  ScaleParams p = scale_params("cpu", gradient, factor, out);
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  const py::gil_scoped_release release;
  kernels.scale(p);
}

#ifdef UNIGENDET_CUDA

void raise_unless_launched(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

// images and tiles are int32 copies of the table on the device, as plan() makes them; their numbers are not read here.
void alignment_loss_cuda(const py::handle& student, const py::handle& teacher, const py::handle& table,
                         const py::handle& normalizer, const py::handle& token_weights, double weight,
                         const py::handle& loss, const py::handle& means, const py::handle& dstudent,
                         const py::handle& dteacher, const py::handle& distances, const py::handle& coefficients,
                         std::pair<bool, bool> unit_gradients, const py::handle& images, const py::handle& tiles,
                         const py::handle& image_sums, uintptr_t stream) {
  AlignmentLossCall call("cuda", student, teacher, table, normalizer, token_weights, weight, loss, means, dstudent,
                         dteacher, distances, coefficients, unit_gradients);
  AlignmentLossParams& p = call.params;
  const View& like = call.inputs.front();
  int64_t num_tiles = 0;
  for (const Image& image : call.images) {
    num_tiles += (static_cast<int64_t>(image.h) * image.w + kTileTokens - 1) / kTileTokens;
  }
  const int64_t num_images = p.num_images;
  const View plan[] = {workspace("images", images, "torch.int32", num_images * 6, like),
                       workspace("tiles", tiles, "torch.int32", num_tiles * 2, like)};
  const View sums = workspace("image_sums", image_sums, "torch.float64", num_images + 1, like);
  call.inputs.insert(call.inputs.end(), std::begin(plan), std::end(plan));
  call.outputs.push_back(sums);
  keep_apart(call.outputs, call.inputs);
  p.images = plan[0].as<Image>();
  p.tiles = plan[1].as<Tile>();
  p.num_tiles = static_cast<int32_t>(num_tiles);
  p.image_sums = sums.as<double>();
  p.stream = reinterpret_cast<void*>(stream);
  const char* error = nullptr;
  {
    const py::gil_scoped_release release;
    error = cuda::alignment_loss(p);
  }
  raise_unless_launched(error);
}

void scale_cuda(const py::handle& gradient, const py::handle& factor, const py::handle& out, uintptr_t stream) {
  ScaleParams p = scale_params("cuda", gradient, factor, out);
  p.stream = reinterpret_cast<void*>(stream);
  raise_unless_launched(cuda::scale(p));
}

#endif

// The table as the CUDA build wants it on the device: (images, tiles), each the bytes of an int32 array.
py::tuple plan(const py::handle& table, int64_t student_rows, int64_t teacher_rows) {
  const std::vector<Image> images = images_of(table, student_rows, teacher_rows);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t tokens = static_cast<int64_t>(images[i].h) * images[i].w;
    for (int64_t token = 0; token < tokens; token += kTileTokens) {
      tiles.push_back({static_cast<int32_t>(i), static_cast<int32_t>(token)});
    }
  }
  const auto bytes = [](const auto& items) {
    return py::bytearray(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(items[0]));
  };
  return py::make_tuple(bytes(images), bytes(tiles));
}

}  // namespace

void define_alignment_loss(py::module_& module) {
  const py::kw_only named;
  module.def("plan", plan, py::arg("table"), py::arg("student_rows"), py::arg("teacher_rows"));
  module.def("alignment_loss_cpu", alignment_loss_cpu, named, py::arg("student"), py::arg("teacher"), py::arg("table"),
             py::arg("normalizer"), py::arg("token_weights"), py::arg("weight"), py::arg("loss"), py::arg("means"),
             py::arg("dstudent"), py::arg("dteacher"), py::arg("distances"), py::arg("coefficients"),
             py::arg("unit_gradients"), py::arg("num_threads"), py::arg("isa") = py::none());
  module.def("scale_cpu", scale_cpu, named, py::arg("gradient"), py::arg("factor"), py::arg("out"),
             py::arg("num_threads"), py::arg("isa") = py::none());
#ifdef UNIGENDET_CUDA
  module.def("alignment_loss_cuda", alignment_loss_cuda, named, py::arg("student"), py::arg("teacher"),
             py::arg("table"), py::arg("normalizer"), py::arg("token_weights"), py::arg("weight"), py::arg("loss"),
             py::arg("means"), py::arg("dstudent"), py::arg("dteacher"), py::arg("distances"), py::arg("coefficients"),
             py::arg("unit_gradients"), py::arg("images"), py::arg("tiles"), py::arg("image_sums"), py::arg("stream"));
  module.def("scale_cuda", scale_cuda, named, py::arg("gradient"), py::arg("factor"), py::arg("out"),
             py::arg("stream"));
#endif
}

}  // namespace unigendet
