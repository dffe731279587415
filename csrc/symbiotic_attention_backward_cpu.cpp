// Attention on the CPU, backward: the maths stands in unigendet/ops/symbiotic_attention.py. Compiled once per instruction
// set, as alignment_loss_cpu.cpp is.
//
// A task goes through its blocks of keys one after the other; dk and dv of a block are complete when all heads of its group
// and all tiles of its sample have been met. The tasks of a sample add to parts of dq of their own, which are summed in one
// order: results do not depend on the number of threads.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention_cpu.h"
#include "cpu_kernels.h"

namespace unigendet {
namespace {

// What a thread works in: matrices of kStride floats a row, and the mask of a block.
struct Scratch {
  float *q, *dout, *p, *ds;                                     // of a tile
  float *keys, *dk, *dv, *keys_transposed, *values_transposed;  // of a block
  int32_t* bounds;

  explicit Scratch(float* memory)
      : q(take(&memory, kTileRows * kStride)), dout(take(&memory, kTileRows * kStride)),
        p(take(&memory, kTileRows * kStride)), ds(take(&memory, kTileRows * kStride)),
        keys(take(&memory, kBlockKeys * kStride)), dk(take(&memory, kBlockKeys * kStride)),
        dv(take(&memory, kBlockKeys * kStride)), keys_transposed(take(&memory, kMaxHeadDim * kStride)),
        values_transposed(take(&memory, kMaxHeadDim * kStride)), bounds(reinterpret_cast<int32_t*>(memory)) {}
};

// delta of one query and head: the product of the output and its gradient, without the gradient of lse.
template <class T>
UNIGENDET_INLINE float delta_of(const AttentionBackwardParams& p, int64_t query, int64_t head) {
  const AttentionInputs& in = p.inputs;
  const int64_t row = out_row(in, query);
  const T *dout = head_row<T>(p.dout, row, head), *out = head_row<T>(p.out, row, head);
  Floats products = {};
  for_columns(in.head_dim, [&](int64_t d, auto lanes) { products += lanes.get(dout + d) * lanes.get(out + d); });
  return sum(products) - (p.dlse == nullptr ? 0.0f : p.dlse[head * in.queries + query]);
}

// Where a part of dq of one query of a tile and one head is summed, and the floats from one query to the next.
UNIGENDET_INLINE int64_t dq_stride(const AttentionInputs& in) { return in.q_heads * padded_floats(in.head_dim); }
UNIGENDET_INLINE float* dq_of(const AttentionBackwardParams& p, const AttentionTile& tile, int32_t part, int64_t query,
                              int64_t head) {
  float* first = p.sums_in_dq ? static_cast<float*>(p.dq) : p.first_parts;
  float* rows = part == 0 ? first + query * dq_stride(p.inputs)
                          : p.more_parts + (tile.more + (part - 1) * tile.sample_queries + query - tile.begin) *
                                               dq_stride(p.inputs);
  return rows + head * padded_floats(p.inputs.head_dim);
}

// p and ds of one query: from scores and from the products of the output's gradient with the values.
UNIGENDET_INLINE void differentiate(float* scores, float* ds, int64_t keys, int64_t query, const int32_t* bounds, float lse,
                                    float delta) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    Floats s = load(scores + j) - lse;
    if (bounds != nullptr) s = masked(s, query, bounds + j);
    const Floats probability = exponential(s);
    store(probability, scores + j);
    store(probability * (load(ds + j) - delta), ds + j);
  }
}

// One head of a tile against one block, whose matrices are in the scratch memory.
template <class T>
void meet(const AttentionBackwardParams& p, const AttentionTile& tile, const AttentionBlock& block, int64_t head,
          int32_t part, const Scratch& scratch) {
  const AttentionInputs& in = p.inputs;
  const Meeting met = meeting(tile, block);
  if (met.begin >= met.end) return;
  const int64_t keys = block.end - block.begin, padded = padded_floats(keys), rows = met.end - met.begin;
  const int64_t vectors = padded / kLanes, columns = padded_floats(in.head_dim) / kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = met.begin + i;
    pack_row(head_row<T>(in.q, query, head), in.head_dim, in.scale, scratch.q + i * kStride);
    pack_row(head_row<T>(p.dout, out_row(in, query), head), in.head_dim, 1.0f, scratch.dout + i * kStride);
  }
  multiply<false>(rows, vectors, in.head_dim, scratch.q, scratch.keys_transposed, scratch.p, kStride, false);
  multiply<false>(rows, vectors, in.head_dim, scratch.dout, scratch.values_transposed, scratch.ds, kStride, false);
  const int64_t first = head * in.queries + met.begin;
  for (int64_t i = 0; i < rows; ++i) {
    differentiate(scratch.p + i * kStride, scratch.ds + i * kStride, padded, met.begin + i,
                  met.whole ? nullptr : scratch.bounds, p.lse[first + i], p.delta[first + i]);
  }
  multiply<true>(keys, columns, rows, scratch.p, scratch.dout, scratch.dv, kStride, true);
  multiply<true>(keys, columns, rows, scratch.ds, scratch.q, scratch.dk, kStride, true);
  multiply<false>(rows, columns, keys, scratch.ds, scratch.keys, dq_of(p, tile, part, met.begin, head), dq_stride(in),
                  true);
}

template <class T>
void store_gradients(const AttentionInputs& in, const AttentionBlock& block, int64_t head, const float* sums, void* to) {
  for (int64_t i = 0; i < block.end - block.begin; ++i) {
    T* row = static_cast<T*>(to) + ((block.begin + i) * in.kv_heads + head) * in.head_dim;
    for_columns(in.head_dim, [&](int64_t d, auto lanes) { lanes.put(load(sums + i * kStride + d), row + d); });
  }
}

// One head of keys and values of a task.
template <class T>
void run_task(const AttentionBackwardParams& p, const AttentionTask& task, int64_t head, const Scratch& scratch) {
  const AttentionInputs& in = p.inputs;
  const int64_t group = in.q_heads / in.kv_heads;
  for (int64_t j = task.first_block; j < task.end_block; ++j) {
    const AttentionBlock& block = in.blocks[j];
    pack_transposed<T>({in, block, in.k, head}, scratch.keys_transposed);
    pack_transposed<T>({in, block, in.v, head}, scratch.values_transposed);
    pack<T>({in, block, in.k, head}, in.scale, scratch.keys);
    copy_bounds(in, block, scratch.bounds);
    const size_t bytes = static_cast<size_t>((block.end - block.begin) * kStride) * sizeof(float);
    memset(scratch.dk, 0, bytes);
    memset(scratch.dv, 0, bytes);
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      for (int64_t i = block.first_tile; i < block.end_tile; ++i) meet<T>(p, in.tiles[i], block, h, task.part, scratch);
    }
    store_gradients<T>(in, block, head, scratch.dk, p.dk);
    store_gradients<T>(in, block, head, scratch.dv, p.dv);
  }
}

// dq of a tile's queries from its parts.
template <class T>
void sum_parts(const AttentionBackwardParams& p, const AttentionTile& tile) {
  const AttentionInputs& in = p.inputs;
  for (int64_t query = tile.begin; query < tile.end; ++query) {
    for (int64_t head = 0; head < in.q_heads; ++head) {
      T* dq = static_cast<T*>(p.dq) + (query * in.q_heads + head) * in.head_dim;
      for_columns(in.head_dim, [&](int64_t d, auto lanes) {
        Floats total = load(dq_of(p, tile, 0, query, head) + d);
        for (int32_t part = 1; part < tile.parts; ++part) total += load(dq_of(p, tile, part, query, head) + d);
        lanes.put(total, dq + d);
      });
    }
  }
}

// What comes before the tasks for a tile's queries: delta, and zeros in all parts of dq.
template <class T>
void prepare(const AttentionBackwardParams& p, const AttentionTile& tile) {
  const AttentionInputs& in = p.inputs;
  for (int64_t query = tile.begin; query < tile.end; ++query) {
    for (int64_t head = 0; head < in.q_heads; ++head) {
      p.delta[head * in.queries + query] = delta_of<T>(p, query, head);
    }
  }
  const size_t bytes = static_cast<size_t>((tile.end - tile.begin) * dq_stride(in)) * sizeof(float);
  for (int32_t part = 0; part < larger(tile.parts, 1); ++part) memset(dq_of(p, tile, part, tile.begin, 0), 0, bytes);
}

template <class T>
void backward(const AttentionBackwardParams& p) {
  const AttentionInputs& in = p.inputs;
#pragma omp parallel num_threads(in.num_threads)
  {
    const Scratch scratch(p.scratch + this_thread() * attention_backward_scratch());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.num_tiles; ++i) prepare<T>(p, in.tiles[i]);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.num_tasks * in.kv_heads; ++i) {
      run_task<T>(p, p.tasks[i / in.kv_heads], i % in.kv_heads, scratch);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.num_tiles; ++i) {
      if (in.tiles[i].parts > 1 || !p.sums_in_dq) sum_parts<T>(p, in.tiles[i]);
    }
  }
}

}  // namespace

namespace UNIGENDET_ISA {

void attention_backward(const AttentionBackwardParams& p) {
  switch (p.inputs.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::bfloat16: return backward<Bfloat16>(p);
    case Dtype::float16: return backward<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
