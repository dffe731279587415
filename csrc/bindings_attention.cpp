// Attention as Python functions: what its kernels take, checked. On the CPU only.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "params.h"
#include "tensors.h"

namespace unigendet {
namespace {

using Isa = std::optional<std::string>;

constexpr int64_t kFields = 7;  // of a split

// Layout.splits: int64 [7 n], whose samples' queries and keys follow each other and are as many as there are rows.
View check_splits(const py::handle& object, int64_t queries, int64_t keys, const View& like) {
  View v = typed("splits", object, "torch.int64", 1, &like);
  const int64_t* s = v.as<const int64_t>();
  int64_t next_query = 0, next_key = 0, sample_begin = 0, sample_end = 0;
  bool fits = v.numel % kFields == 0;
  for (int64_t i = 0; fits && i < v.numel; i += kFields) {
    const int64_t key_begin = s[i + 1], key_end = s[i + 2], query_begin = s[i + 5], query_end = s[i + 6];
    if (i == 0 || s[i + 3] != sample_begin) {
      fits = s[i + 3] >= sample_end && next_key == sample_end && s[i + 4] <= keys;
      sample_begin = next_key = s[i + 3];
      sample_end = s[i + 4];
    }
    fits = fits && s[i + 4] == sample_end && key_begin == next_key && key_begin <= key_end && key_end <= sample_end &&
           query_begin == next_query && query_begin <= query_end && query_end <= queries;
    next_key = key_end, next_query = query_end;
  }
  if (!fits || next_query != queries || next_key != sample_end) {
    reject("splits", "a table that does not fit " + std::to_string(queries) + " queries and " + std::to_string(keys) + " keys",
           "Layout.splits of these");
  }
  return v;
}

// What both directions read, checked, and the plan; they live as long as the call.
struct AttentionCall {
  AttentionInputs inputs{};
  AttentionPlan plan;
  std::vector<View> read, written;

  AttentionCall(const py::handle& q, const py::handle& k, const py::handle& v, const py::handle& query_begin,
                const py::handle& query_end, const py::handle& splits, const py::handle& out_rows, double scale,
                int64_t num_threads, bool grouped) {
    const View from = input("q", q, 3), keys = input("k", k, 3);
    inputs.queries = from.shape[0], inputs.q_heads = from.shape[1], inputs.head_dim = from.shape[2];
    inputs.keys = keys.shape[0], inputs.kv_heads = keys.shape[1];
    if (inputs.head_dim < 1 || inputs.head_dim > kMaxHeadDim || inputs.q_heads < 1) {
      reject("q", from.text(), "[queries, heads, head_dim] with a head and head_dim from 1 to " + std::to_string(kMaxHeadDim));
    }
    for (const View* x : {&from, &keys}) {
      if (x->shape[0] >= kMaxInt32) reject(x->name, x->text(), "of fewer than " + std::to_string(kMaxInt32) + " rows");
    }
    if (inputs.kv_heads < 1 || inputs.q_heads % inputs.kv_heads != 0 || keys.shape[2] != inputs.head_dim) {
      reject("k", keys.text(), "[keys, heads, head_dim] with q's head_dim and a number of heads that divides q's");
    }
    read = {from, input_like("k", k, keys.shape, from), input_like("v", v, keys.shape, from),
            exactly("query_begin", query_begin, "torch.int32", {inputs.keys}, from),
            exactly("query_end", query_end, "torch.int32", {inputs.keys}, from)};
    inputs.q = heads_of(read[0]), inputs.k = heads_of(read[1]), inputs.v = heads_of(read[2]);
    inputs.dtype = dtype_of(from);
    inputs.query_begin = read[3].as<int32_t>(), inputs.query_end = read[4].as<int32_t>();
    if (!(std::fabs(scale) <= std::numeric_limits<float>::max())) {
      reject("scale", std::to_string(scale), "a finite number that a float can hold");
    }
    inputs.scale = static_cast<float>(scale);
    inputs.num_threads = check_threads(num_threads);
    if (!out_rows.is_none()) {
      read.push_back(indices("out_rows", out_rows, inputs.queries, inputs.queries, from));
      inputs.out_rows = read.back().as<int64_t>();
    }
    const View table = check_splits(splits, inputs.queries, inputs.keys, from);
    read.push_back(table);
    const int64_t heads = grouped ? heads_of_tile(inputs) : 1;
    plan = plan_attention(table.as<int64_t>(), table.numel / kFields, inputs.query_begin, inputs.query_end,
                          inputs.kv_heads, kTileRows / heads);
    if (grouped) sort_tiles(&plan);
    inputs.tiles = plan.tiles.data(), inputs.num_tiles = static_cast<int64_t>(plan.tiles.size());
    inputs.blocks = plan.blocks.data();
  }

  void* output(const char* name, const py::handle& object, const View& like) {
    written.push_back(exactly(name, object, like.dtype, like.shape, like));
    return written.back().as<void>();
  }
  float* of_queries(std::vector<View>* views, const char* name, const py::handle& object) const {
    views->push_back(exactly(name, object, "torch.float32", {inputs.q_heads, inputs.queries}, read[0]));
    return views->back().as<float>();
  }
};

void attention(const py::handle& q, const py::handle& k, const py::handle& v, const py::handle& query_begin,
               const py::handle& query_end, const py::handle& splits, const py::handle& out_rows, double scale,
               const py::handle& out, const py::handle& lse, int64_t num_threads, const Isa& isa) {
  AttentionCall call(q, k, v, query_begin, query_end, splits, out_rows, scale, num_threads, true);
  AttentionParams p{};
  p.inputs = call.inputs;
  p.out = call.output("out", out, call.read[0]);
  p.lse = call.of_queries(&call.written, "lse", lse);
  keep_apart(call.written, call.read);
  const CpuKernels& kernels = kernels_of(isa);
  const Scratch scratch = allocate_scratch(p.inputs.num_threads * attention_scratch());
  p.scratch = scratch.get();
  const py::gil_scoped_release release;
  kernels.attention(p);
}

void clear(const View& v) {
  if (v.numel > 0) std::memset(v.as<void>(), 0, static_cast<size_t>(v.numel * v.item_size));
}

void attention_backward(const py::handle& dout, const py::handle& dlse, const py::handle& q, const py::handle& k,
                        const py::handle& v, const py::handle& out, const py::handle& lse, const py::handle& query_begin,
                        const py::handle& query_end, const py::handle& splits, const py::handle& out_rows, double scale,
                        const py::handle& dq, const py::handle& dk, const py::handle& dv, int64_t num_threads,
                        const Isa& isa) {
  AttentionCall call(q, k, v, query_begin, query_end, splits, out_rows, scale, num_threads, false);
  const View from = call.read[0], keys = call.read[1];
  AttentionBackwardParams p{};
  p.inputs = call.inputs;
  const AttentionInputs& in = p.inputs;
  call.read.push_back(input_like("dout", dout, from.shape, from));
  p.dout = heads_of(call.read.back());
  call.read.push_back(input_like("out", out, from.shape, from));
  p.out = heads_of(call.read.back());
  p.lse = call.of_queries(&call.read, "lse", lse);
  if (!dlse.is_none()) p.dlse = call.of_queries(&call.read, "dlse", dlse);
  p.dq = call.output("dq", dq, from), p.dk = call.output("dk", dk, keys), p.dv = call.output("dv", dv, keys);
  keep_apart(call.written, call.read);
  p.tasks = call.plan.tasks.data(), p.num_tasks = static_cast<int64_t>(call.plan.tasks.size());
  p.more_rows = call.plan.more_rows;
  p.sums_in_dq = in.dtype == Dtype::float32 && in.head_dim == padded_floats(in.head_dim);
  const CpuKernels& kernels = kernels_of(isa);
  const auto dq_floats = [&in](int64_t rows) { return attention_dq_floats(rows, in.q_heads, in.head_dim); };
  const Scratch delta = allocate_scratch(padded_floats(in.q_heads * in.queries));
  const Scratch first_parts = allocate_scratch(p.sums_in_dq ? 0 : dq_floats(in.queries));
  const Scratch more_parts = allocate_scratch(dq_floats(p.more_rows));
  const Scratch scratch = allocate_scratch(in.num_threads * attention_backward_scratch());
  p.delta = delta.get(), p.first_parts = first_parts.get(), p.more_parts = more_parts.get(), p.scratch = scratch.get();
  const py::gil_scoped_release release;
  if (call.plan.covered_keys < in.keys) clear(call.written[1]), clear(call.written[2]);  // keys of no split
  kernels.attention_backward(p);
}

}  // namespace

void define_attention(py::module_& module) {
  const py::kw_only named;
  const py::arg threads("num_threads");
  const py::arg_v isa("isa", py::none());
  using py::arg;
  module.def("attention_cpu", attention, named, arg("q"), arg("k"), arg("v"), arg("query_begin"), arg("query_end"),
             arg("splits"), arg("out_rows"), arg("scale"), arg("out"), arg("lse"), threads, isa);
  module.def("attention_backward_cpu", attention_backward, named, arg("dout"), arg("dlse"), arg("q"), arg("k"), arg("v"),
             arg("out"), arg("lse"), arg("query_begin"), arg("query_end"), arg("splits"), arg("out_rows"), arg("scale"),
             arg("dq"), arg("dk"), arg("dv"), threads, isa);
}

}  // namespace unigendet
