// What the ops on stream-major rows share: blocks of rows, sums over them, how many threads a call is worth.
//
// All functions have internal linkage: they are compiled once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 14;  // less is done before another thread has begun

UNIGENDET_INLINE int32_t threads_for(int32_t num_threads, int64_t numbers) {
  return static_cast<int32_t>(smaller(num_threads, 1 + numbers / kNumbersPerThread));
}

constexpr int64_t kTermsPerStage = 16;  // of a sum over rows
constexpr int64_t kBlocksPerStage = 16;

struct Block {
  int64_t begin, end, stream;
};

// The i-th of stream_blocks().
UNIGENDET_INLINE Block block_of(int64_t i, int64_t rows, int64_t understanding) {
  const int64_t first = blocks_of(understanding);
  const int64_t stream = i < first ? 0 : 1;
  const int64_t begin = stream == 0 ? i * kBlockRows : understanding + (i - first) * kBlockRows;
  return {begin, smaller(begin + kBlockRows, stream == 0 ? understanding : rows), stream};
}

struct BlockRange {
  int64_t begin, end;
};

// The blocks of one stream.
UNIGENDET_INLINE BlockRange stream_range(int64_t stream, int64_t rows, int64_t understanding) {
  const int64_t first = blocks_of(understanding);
  return stream == 0 ? BlockRange{0, first} : BlockRange{first, stream_blocks(rows, understanding)};
}

// The sum of many terms in two stages, whose error is that of the square root of their number: a few terms are added in
// `terms`, of a multiple of kLanes floats, and then to `total`. Both null where the sum is not wanted.
struct StagedSum {
  float* terms;
  float* total;
  int64_t floats;

  void clear() const {
    if (total == nullptr) return;
    memset(terms, 0, static_cast<size_t>(floats) * sizeof(float));
    memset(total, 0, static_cast<size_t>(floats) * sizeof(float));
  }
  void fold() const {
    if (total == nullptr) return;
    for (int64_t d = 0; d < floats; d += kLanes) {
      store(load(total + d) + load(terms + d), total + d);
      store(Floats{}, terms + d);
    }
  }
};

// The sum of block i; `partials` holds the blocks' totals and behind them the threads' terms.
UNIGENDET_INLINE StagedSum staged_sum(float* partials, int64_t i, int64_t blocks, int64_t floats, bool needed) {
  if (!needed) return {nullptr, nullptr, floats};
  return {partials + (blocks + this_thread()) * floats, partials + i * floats, floats};
}

// One vector of the blocks' sums, which lie `stride` floats apart, added in their order, in two stages as well.
UNIGENDET_INLINE Floats sum_blocks(const float* partials, int64_t stride, BlockRange blocks) {
  Floats total = {};
  for (int64_t first = blocks.begin; first < blocks.end; first += kBlocksPerStage) {
    const int64_t end = smaller(first + kBlocksPerStage, blocks.end);
    Floats terms = {};
    for (int64_t i = first; i < end; ++i) terms += load(partials + i * stride);
    total += terms;
  }
  return total;
}

}  // namespace
}  // namespace unigendet
