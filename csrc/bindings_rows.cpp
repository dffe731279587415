// The ops on rows as Python functions: what their kernels take, checked. On the CPU only.
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "params.h"
#include "tensors.h"

namespace unigendet {
namespace {

using Isa = std::optional<std::string>;

Rows rows_of(const View& v) { return {v.as<void>(), v.shape[0] > 1 ? v.stride[0] : 0, dtype_of(v)}; }

int64_t check_understanding(int64_t understanding, int64_t rows) {
  if (understanding < 0 || understanding > rows) {
    reject("understanding", std::to_string(understanding), "from 0 to the number of rows, " + std::to_string(rows));
  }
  return understanding;
}

void rms_norm(const py::handle& x, const py::handle& residual, const py::handle& weights, const py::handle& normed,
              const py::handle& summed, const py::handle& rstd, int64_t understanding, double eps, int64_t num_threads,
              const Isa& isa) {
  const View from = input("x", x, 2);
  const int64_t rows = from.shape[0], columns = from.shape[1];
  std::vector<View> inputs = {from, exactly("weights", weights, "torch.float32", {2, columns}, from)};
  std::vector<View> outputs = {exactly("normed", normed, from.dtype, from.shape, from),
                               exactly("rstd", rstd, "torch.float32", {rows}, from)};
  RmsNormParams p{};
  p.x = rows_of(from);
  p.weights = inputs[1].as<float>();
  p.rows = rows;
  p.understanding = check_understanding(understanding, rows);
  p.columns = columns;
  p.eps = static_cast<float>(eps);
  p.normed = outputs[0].as<void>();
  p.rstd = outputs[1].as<float>();
  if (!residual.is_none()) {
    inputs.push_back(input_like("residual", residual, from.shape, from));
    outputs.push_back(exactly("summed", summed, from.dtype, from.shape, from));
    p.residual = rows_of(inputs.back());
    p.summed = outputs.back().as<void>();
  }
  keep_apart(outputs, inputs);
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  if (from.numel == 0) return;
  const py::gil_scoped_release release;
  kernels.rms_norm(p);
}

void rms_norm_backward(const py::handle& dy, const py::handle& dsummed, const py::handle& summed, const py::handle& rstd,
                       const py::handle& weights, const py::handle& ds, const py::handle& dweights,
                       std::pair<bool, bool> needs_weights, int64_t understanding, int64_t num_threads, const Isa& isa) {
  const View from = input("summed", summed, 2);
  const int64_t rows = from.shape[0], columns = from.shape[1];
  std::vector<View> inputs = {from, input_like("dy", dy, from.shape, from),
                              exactly("rstd", rstd, "torch.float32", {rows}, from),
                              exactly("weights", weights, "torch.float32", {2, columns}, from)};
  std::vector<View> outputs = {exactly("dweights", dweights, "torch.float32", {2, columns}, from)};
  RmsNormBackwardParams p{};
  p.summed = rows_of(from);
  p.dy = rows_of(inputs[1]);
  p.rstd = inputs[2].as<float>();
  p.weights = inputs[3].as<float>();
  p.rows = rows;
  p.understanding = check_understanding(understanding, rows);
  p.columns = columns;
  p.dweights = outputs[0].as<float>();
  p.needs_weights[0] = needs_weights.first;
  p.needs_weights[1] = needs_weights.second;
  if (!dsummed.is_none()) {
    inputs.push_back(input_like("dsummed", dsummed, from.shape, from));
    p.dsummed = rows_of(inputs.back());
  }
  if (!ds.is_none()) {
    outputs.push_back(exactly("ds", ds, from.dtype, from.shape, from));
    p.ds = outputs.back().as<void>();
  }
  keep_apart(outputs, inputs);
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  const Scratch partials = allocate_scratch(rms_norm_partials(rows, p.understanding, columns, p.num_threads));
  p.partials = partials.get();
  const py::gil_scoped_release release;
  kernels.rms_norm_backward(p);
}

int64_t half_of(const View& gate_up) {
  if (gate_up.shape[1] % 2 != 0) reject(gate_up.name, gate_up.text(), "of an even number of columns");
  return gate_up.shape[1] / 2;
}

void swiglu(const py::handle& gate_up, const py::handle& out, int64_t num_threads, const Isa& isa) {
  const View from = input("gate_up", gate_up, 2);
  const int64_t rows = from.shape[0], columns = half_of(from);
  const View to = exactly("out", out, from.dtype, {rows, columns}, from);
  keep_apart({to}, {from});
  const SwigluParams p = {rows_of(from), rows, columns, to.as<void>(), check_threads(num_threads)};
  const CpuKernels& kernels = kernels_of(isa);
  if (from.numel == 0) return;
  const py::gil_scoped_release release;
  kernels.swiglu(p);
}

void swiglu_backward(const py::handle& dy, const py::handle& gate_up, const py::handle& gradient, int64_t num_threads,
                     const Isa& isa) {
  const View from = input("gate_up", gate_up, 2);
  const int64_t rows = from.shape[0], columns = half_of(from);
  const View incoming = input_like("dy", dy, {rows, columns}, from);
  const View to = exactly("gradient", gradient, from.dtype, from.shape, from);
  keep_apart({to}, {from, incoming});
  const SwigluBackwardParams p = {rows_of(incoming), rows_of(from), rows,
                                  columns,           to.as<void>(), check_threads(num_threads)};
  const CpuKernels& kernels = kernels_of(isa);
  if (from.numel == 0) return;
  const py::gil_scoped_release release;
  kernels.swiglu_backward(p);
}

// What both directions of qk_norm_rope read, checked; the views live as long as the call.
struct QkNormRopeCall {
  QkNormRopeInputs inputs{};
  std::vector<View> read, written;

  QkNormRopeCall(const py::handle& qkv, const py::handle& weights, const py::handle& cos, const py::handle& sin,
                 const py::handle& rows_map, const py::handle& positions, std::pair<int64_t, int64_t> heads,
                 int64_t understanding, double eps) {
    const View from = input("qkv", qkv, 2);
    int64_t total = 0;
    if (heads.first < 1 || heads.second < 1 || !multiply(2, heads.second, &total) ||
        __builtin_add_overflow(total, heads.first, &total) || from.shape[1] < 1 || from.shape[1] % total != 0 ||
        from.shape[1] / total % 2 != 0) {
      reject("qkv", from.text(), "as wide as heads of an even head_dim for q, k and v");
    }
    inputs.rows = from.shape[0];
    inputs.understanding = check_understanding(understanding, inputs.rows);
    inputs.q_heads = heads.first;
    inputs.kv_heads = heads.second;
    inputs.head_dim = from.shape[1] / total;
    inputs.eps = static_cast<float>(eps);
    inputs.qkv = rows_of(from);
    const View c = typed("cos", cos, "torch.float32", 2, &from);
    check_shape(c, {c.shape[0], inputs.head_dim / 2});
    read = {from, exactly("weights", weights, "torch.float32", {4, inputs.head_dim}, from), c,
            exactly("sin", sin, "torch.float32", c.shape, from),
            indices("rows_map", rows_map, inputs.rows, inputs.rows, from),
            indices("positions", positions, inputs.rows, c.shape[0], from)};
    inputs.weights = read[1].as<float>();
    inputs.cos = c.as<float>();
    inputs.sin = read[3].as<float>();
    inputs.rows_map = read[4].as<int64_t>();
    inputs.positions = read[5].as<int64_t>();
  }

  std::vector<int64_t> shape(int64_t heads) const { return {inputs.rows, heads, inputs.head_dim}; }

  const View& output(const std::string& name, const py::handle& object, const std::string& dtype,
                     const std::vector<int64_t>& shape) {
    written.push_back(exactly(name, object, dtype, shape, read[0]));
    return written.back();
  }

  Heads gradient(const std::string& name, const py::handle& object, int64_t heads) {
    read.push_back(input_like(name, object, shape(heads), read[0]));
    return heads_of(read.back());
  }
};

void qk_norm_rope(const py::handle& qkv, const py::handle& weights, const py::handle& cos, const py::handle& sin,
                  const py::handle& to_stream, const py::handle& positions, std::pair<int64_t, int64_t> heads,
                  int64_t understanding, double eps, const py::handle& q, const py::handle& k, const py::handle& v,
                  int64_t num_threads, const Isa& isa) {
  QkNormRopeCall call(qkv, weights, cos, sin, to_stream, positions, heads, understanding, eps);
  const std::string dtype = call.read[0].dtype;
  QkNormRopeParams p{};
  p.inputs = call.inputs;
  p.q = call.output("q", q, dtype, call.shape(heads.first)).as<void>();
  p.k = call.output("k", k, dtype, call.shape(heads.second)).as<void>();
  p.v = call.output("v", v, dtype, call.shape(heads.second)).as<void>();
  keep_apart(call.written, call.read);
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  if (p.inputs.rows == 0) return;
  const py::gil_scoped_release release;
  kernels.qk_norm_rope(p);
}

void qk_norm_rope_backward(const py::handle& dq, const py::handle& dk, const py::handle& dv, const py::handle& qkv,
                           const py::handle& weights, const py::handle& cos, const py::handle& sin,
                           const py::handle& to_sequence, const py::handle& positions, std::pair<int64_t, int64_t> heads,
                           int64_t understanding, double eps, const py::handle& dqkv, const py::handle& dweights,
                           std::pair<bool, bool> needs_weights, int64_t num_threads, const Isa& isa) {
  QkNormRopeCall call(qkv, weights, cos, sin, to_sequence, positions, heads, understanding, eps);
  QkNormRopeBackwardParams p{};
  p.inputs = call.inputs;
  p.dq = call.gradient("dq", dq, heads.first);
  p.dk = call.gradient("dk", dk, heads.second);
  p.dv = call.gradient("dv", dv, heads.second);
  p.dweights = call.output("dweights", dweights, "torch.float32", {4, p.inputs.head_dim}).as<float>();
  p.needs_weights[0] = needs_weights.first;
  p.needs_weights[1] = needs_weights.second;
  if (!dqkv.is_none()) p.dqkv = call.output("dqkv", dqkv, call.read[0].dtype, call.read[0].shape).as<void>();
  keep_apart(call.written, call.read);
  p.num_threads = check_threads(num_threads);
  const CpuKernels& kernels = kernels_of(isa);
  const Scratch partials = allocate_scratch(
      qk_norm_rope_partials(p.inputs.rows, p.inputs.understanding, p.inputs.head_dim, p.num_threads));
  p.partials = partials.get();
  const py::gil_scoped_release release;
  kernels.qk_norm_rope_backward(p);
}

}  // namespace

void define_rows(py::module_& module) {
  const py::kw_only named;
  const py::arg threads("num_threads");
  const py::arg_v isa("isa", py::none());
  using py::arg;
  module.def("qk_norm_rope_cpu", qk_norm_rope, named, arg("qkv"), arg("weights"), arg("cos"), arg("sin"),
             arg("to_stream"), arg("positions"), arg("heads"), arg("understanding"), arg("eps"), arg("q"), arg("k"),
             arg("v"), threads, isa);
  module.def("qk_norm_rope_backward_cpu", qk_norm_rope_backward, named, arg("dq"), arg("dk"), arg("dv"), arg("qkv"),
             arg("weights"), arg("cos"), arg("sin"), arg("to_sequence"), arg("positions"), arg("heads"),
             arg("understanding"), arg("eps"), arg("dqkv"), arg("dweights"), arg("needs_weights"), threads, isa);
  module.def("rms_norm_cpu", rms_norm, named, arg("x"), arg("residual"), arg("weights"), arg("normed"), arg("summed"),
             arg("rstd"), arg("understanding"), arg("eps"), threads, isa);
  module.def("rms_norm_backward_cpu", rms_norm_backward, named, arg("dy"), arg("dsummed"), arg("summed"), arg("rstd"),
             arg("weights"), arg("ds"), arg("dweights"), arg("needs_weights"), arg("understanding"), threads, isa);
  module.def("swiglu_cpu", swiglu, named, arg("gate_up"), arg("out"), threads, isa);
  module.def("swiglu_backward_cpu", swiglu_backward, named, arg("dy"), arg("gate_up"), arg("gradient"), threads, isa);
}

}  // namespace unigendet
