// Attention on the CPU, forward: the maths stands in unigendet/ops/symbiotic_attention.py. Compiled once per instruction
// set, as alignment_loss_cpu.cpp is.
//
// A tile's rows are its queries' heads that share a head of keys: with n of them, row i n + h is head h of query i. Each tile
// goes through the blocks of keys that it sees, with a running maximum and sum of each row. Keys are packed anew for each
// tile, which costs a few percent of the products of a full one, and no memory.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention_cpu.h"
#include "cpu_kernels.h"

namespace unigendet {
namespace {

// What a thread works in: matrices of kStride floats a row, and two numbers of each row of the tile.
struct Scratch {
  float *q, *scores, *out, *keys_transposed, *values, *most, *total;
  int32_t* bounds;

  explicit Scratch(float* memory)
      : q(take(&memory, kTileRows * kStride)), scores(take(&memory, kTileRows * kStride)),
        out(take(&memory, kTileRows * kStride)), keys_transposed(take(&memory, kMaxHeadDim * kStride)),
        values(take(&memory, kBlockKeys * kStride)), most(take(&memory, kTileRows)), total(take(&memory, kTileRows)),
        bounds(reinterpret_cast<int32_t*>(memory)) {}
};

// A row's scores with a block's keys become exp(score - maximum); its sum and its output so far are adapted to the new
// maximum.
UNIGENDET_INLINE void exponentiate(float* scores, int64_t keys, int64_t query, const int32_t* bounds, float* most,
                                   float* total, float* out, int64_t width) {
  Floats lanes = Floats{} - kInfinity;
  for (int64_t j = 0; j < keys; j += kLanes) {
    Floats s = load(scores + j);
    if (bounds != nullptr) {
      s = masked(s, query, bounds + j);
      store(s, scores + j);
    }
    lanes = s > lanes ? s : lanes;
  }
  const float highest = maximum(lanes);
  if (highest > *most) {
    const Floats factor = exponential(Floats{} + (*most - highest));
    *most = highest;
    *total *= factor[0];
    for (int64_t d = 0; d < width; d += kLanes) store(load(out + d) * factor, out + d);
  }
  // A row that has seen no key yet: all its scores are minus infinity, of which nothing may be taken away.
  const float base = *most == -kInfinity ? 0.0f : *most;
  Floats sums = {};
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Floats e = exponential(load(scores + j) - base);
    store(e, scores + j);
    sums += e;
  }
  *total += sum(sums);
}

// A tile of the q heads from `head` on, against one block.
template <class T>
void attend_block(const AttentionInputs& in, const AttentionTile& tile, const AttentionBlock& block, int64_t head,
                  const Scratch& scratch) {
  const Meeting met = meeting(tile, block);
  if (met.begin >= met.end) return;
  const int64_t kv_head = head / (in.q_heads / in.kv_heads);
  pack_transposed<T>({in, block, in.k, kv_head}, scratch.keys_transposed);
  pack<T>({in, block, in.v, kv_head}, 1.0f, scratch.values);
  if (!met.whole) copy_bounds(in, block, scratch.bounds);
  const int64_t heads = heads_of_tile(in), keys = block.end - block.begin, padded = padded_floats(keys);
  const int64_t first = (met.begin - tile.begin) * heads, rows = (met.end - met.begin) * heads;
  const int64_t width = padded_floats(in.head_dim);
  float *scores = scratch.scores + first * kStride, *out = scratch.out + first * kStride;
  multiply<false>(rows, padded / kLanes, in.head_dim, scratch.q + first * kStride, scratch.keys_transposed, scores, kStride,
                  false);
  for (int64_t i = 0; i < rows; ++i) {
    exponentiate(scores + i * kStride, padded, met.begin + i / heads, met.whole ? nullptr : scratch.bounds,
                 scratch.most + first + i, scratch.total + first + i, out + i * kStride, width);
  }
  multiply<false>(rows, width / kLanes, keys, scores, scratch.values, out, kStride, true);
}

template <class T>
void attend_tile(const AttentionParams& p, const AttentionTile& tile, int64_t head, const Scratch& scratch) {
  const AttentionInputs& in = p.inputs;
  const int64_t heads = heads_of_tile(in), rows = (tile.end - tile.begin) * heads;
  for (int64_t i = 0; i < rows; ++i) {
    const T* q = head_row<T>(in.q, tile.begin + i / heads, head + i % heads);
    pack_row(q, in.head_dim, in.scale, scratch.q + i * kStride);
    scratch.most[i] = -kInfinity;
    scratch.total[i] = 0.0f;
  }
  memset(scratch.out, 0, static_cast<size_t>(rows * kStride) * sizeof(float));
  for (int64_t j = tile.first_block; j < tile.end_block; ++j) attend_block<T>(in, tile, in.blocks[j], head, scratch);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = tile.begin + i / heads, q_head = head + i % heads;
    T* out = static_cast<T*>(p.out) + (out_row(in, query) * in.q_heads + q_head) * in.head_dim;
    const float *sums = scratch.out + i * kStride, factor = 1.0f / scratch.total[i];
    for_columns(in.head_dim, [&](int64_t d, auto lanes) { lanes.put(load(sums + d) * factor, out + d); });
    p.lse[q_head * in.queries + query] = scratch.most[i] + logf(scratch.total[i]);
  }
}

template <class T>
void forward(const AttentionParams& p) {
  const AttentionInputs& in = p.inputs;
  const int64_t rounds = in.q_heads / heads_of_tile(in);
#pragma omp parallel num_threads(in.num_threads)
  {
    const Scratch scratch(p.scratch + this_thread() * attention_scratch());
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < in.num_tiles * rounds; ++i) {
      attend_tile<T>(p, in.tiles[i / rounds], i % rounds * heads_of_tile(in), scratch);
    }
  }
}

}  // namespace

namespace UNIGENDET_ISA {

void attention(const AttentionParams& p) {
  switch (p.inputs.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::bfloat16: return forward<Bfloat16>(p);
    case Dtype::float16: return forward<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
