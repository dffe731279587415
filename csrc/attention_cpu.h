// What both directions of attention on the CPU share: rows in and out of scratch memory, and the mask.
//
// All functions have internal linkage: they are compiled once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"
#include "products_cpu.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

typedef int32_t Ints __attribute__((vector_size(64)));

// The next `floats` of a workspace.
UNIGENDET_INLINE float* take(float** memory, int64_t floats) {
  float* begin = *memory;
  *memory += floats;
  return begin;
}

constexpr float kInfinity = __builtin_inff();

template <class T>
UNIGENDET_INLINE const T* head_row(const Heads& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

UNIGENDET_INLINE int64_t out_row(const AttentionInputs& in, int64_t query) {
  return in.out_rows == nullptr ? query : in.out_rows[query];
}

UNIGENDET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The query rows of a tile that a block's keys are seen by, and whether each of them sees all of whole vectors of keys.
struct Meeting {
  int64_t begin, end;
  bool whole;
};
UNIGENDET_INLINE Meeting meeting(const AttentionTile& tile, const AttentionBlock& block) {
  const int64_t begin = larger(tile.begin, block.least_begin), end = smaller(tile.end, block.most_end);
  return {begin, end, block.most_begin <= begin && block.least_end >= end && (block.end - block.begin) % kLanes == 0};
}

// A row of `columns` numbers times `factor`, filled up with zeros to whole vectors.
template <class T>
UNIGENDET_INLINE void pack_row(const T* row, int64_t columns, float factor, float* to) {
  for (int64_t d = 0; d < columns; d += kLanes) store(scaled_vector(row, d, columns, factor), to + d);
}

// The keys (or values) of a block that a head has.
struct BlockRows {
  const AttentionInputs& in;
  const AttentionBlock& block;
  const Heads& x;
  int64_t head;

  int64_t count() const { return block.end - block.begin; }
  int64_t padded() const { return padded_floats(count()); }
  // A row that no query sees may be spare memory of a cache: whatever it holds must not be multiplied by zero.
  bool is_seen(int64_t i) const {
    return i < count() && in.query_begin[block.begin + i] < in.query_end[block.begin + i];
  }
  template <class T>
  const T* row(int64_t i) const {
    return head_row<T>(x, block.begin + i, head);
  }
};

// The rows, times `factor`, [padded, head_dim] with kStride floats a row.
template <class T>
void pack(const BlockRows& rows, float factor, float* to) {
  const int64_t columns = rows.in.head_dim;
  for (int64_t i = 0; i < rows.padded(); ++i) {
    if (rows.is_seen(i)) {
      pack_row(rows.row<T>(i), columns, factor, to + i * kStride);
    } else {
      for (int64_t d = 0; d < columns; d += kLanes) store(Floats{}, to + i * kStride + d);
    }
  }
}

// Their transpose, [head_dim, padded] with kStride floats a row.
template <class T>
void pack_transposed(const BlockRows& rows, float* to) {
  const int64_t columns = rows.in.head_dim;
  for (int64_t first = 0; first < rows.padded(); first += kLanes) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      Floats square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = rows.is_seen(first + i) ? scaled_vector(rows.row<T>(first + i), d, columns, 1.0f) : Floats{};
      }
      transpose(square);
      for (int64_t i = 0; i < smaller(kLanes, columns - d); ++i) store(square[i], to + (d + i) * kStride + first);
    }
  }
}

// The mask's two numbers of each key of a block, filled up with keys that nobody sees; [2, kBlockKeys].
UNIGENDET_INLINE void copy_bounds(const AttentionInputs& in, const AttentionBlock& block, int32_t* bounds) {
  const size_t count = static_cast<size_t>(block.end - block.begin), bytes = count * sizeof(int32_t);
  memcpy(bounds, in.query_begin + block.begin, bytes);
  memcpy(bounds + kBlockKeys, in.query_end + block.begin, bytes);
  memset(bounds + count, 0, static_cast<size_t>(kBlockKeys) * sizeof(int32_t) - bytes);
  memset(bounds + kBlockKeys + count, 0, static_cast<size_t>(kBlockKeys) * sizeof(int32_t) - bytes);
}

// 16 scores of a query, minus infinity where it does not see the key.
UNIGENDET_INLINE Floats masked(Floats scores, int64_t query, const int32_t* bounds) {
  Ints begin, end;
  memcpy(&begin, bounds, sizeof begin);
  memcpy(&end, bounds + kBlockKeys, sizeof end);
  const Ints row = Ints{} + static_cast<int32_t>(query);
  return ((begin <= row) & (row < end)) ? scores : Floats{} - kInfinity;
}

}  // namespace
}  // namespace unigendet
