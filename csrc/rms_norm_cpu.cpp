// Residual add and RMSNorm on the CPU: the maths stands in unigendet/ops/rms_norm.py. Compiled once per instruction set,
// as alignment_loss_cpu.cpp is.
#include <math.h>
#include <stdint.h>

#include "cpu_kernels.h"
#include "rows_cpu.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

template <class T>
void forward_row(const RmsNormParams& p, int64_t row, const float* weight) {
  const int64_t columns = p.columns;
  const T* x = row_of<T>(p.x, row);
  const T* source = x;
  Floats squares = {};
  if (p.residual.data == nullptr) {
    for_columns(columns, [&](int64_t d, auto lanes) {
      const Floats s = lanes.get(x + d);
      squares += s * s;
    });
  } else {
    const T* residual = row_of<T>(p.residual, row);
    T* summed = static_cast<T*>(p.summed) + row * columns;
    for_columns(columns, [&](int64_t d, auto lanes) {
      const Floats s = rounded<T>(lanes.get(x + d) + lanes.get(residual + d));
      lanes.put(s, summed + d);
      squares += s * s;
    });
    source = summed;
  }
  const float rstd = 1.0f / sqrtf(sum(squares) / static_cast<float>(columns) + p.eps);
  p.rstd[row] = rstd;
  T* normed = static_cast<T*>(p.normed) + row * columns;
  for_columns(columns, [&](int64_t d, auto lanes) {
    lanes.put(lanes.get(weight + d) * rounded<T>(lanes.get(source + d) * rstd), normed + d);
  });
}

// One row: ds unless it is null, and the weight's gradient added to dweight unless that is null.
template <class T>
void backward_row(const RmsNormBackwardParams& p, int64_t row, const float* weight, float* dweight) {
  const int64_t columns = p.columns;
  const T* dy = row_of<T>(p.dy, row);
  const T* s = row_of<T>(p.summed, row);
  const float rstd = p.rstd[row];
  Floats products = {};
  for_columns(columns, [&](int64_t d, auto lanes) {
    const Floats gradient = lanes.get(dy + d), h = lanes.get(s + d) * rstd;
    if (dweight != nullptr) store(load(dweight + d) + gradient * h, dweight + d);
    products += gradient * lanes.get(weight + d) * h;
  });
  if (p.ds == nullptr) return;
  const float mean = sum(products) / static_cast<float>(columns);
  T* ds = static_cast<T*>(p.ds) + row * columns;
  const auto through_norm = [&](int64_t d, auto lanes) {
    return rstd * (lanes.get(dy + d) * lanes.get(weight + d) - lanes.get(s + d) * rstd * mean);
  };
  if (p.dsummed.data == nullptr) {
    for_columns(columns, [&](int64_t d, auto lanes) { lanes.put(through_norm(d, lanes), ds + d); });
  } else {
    const T* dsummed = row_of<T>(p.dsummed, row);
    for_columns(columns, [&](int64_t d, auto lanes) { lanes.put(through_norm(d, lanes) + lanes.get(dsummed + d), ds + d); });
  }
}

template <class T>
void forward(const RmsNormParams& p) {
  const int64_t bytes = p.rows * p.columns * static_cast<int64_t>(sizeof(T));
  const int64_t blocks = stream_blocks(p.rows, p.understanding);
  void* summed = p.residual.data == nullptr ? nullptr : p.summed;
  advise_huge_pages(p.normed, bytes);
  advise_huge_pages(summed, bytes);
#pragma omp parallel num_threads(threads_for(p.num_threads, p.rows * p.columns))
  {
    populate(p.normed, bytes, this_thread(), num_threads());
    populate(summed, bytes, this_thread(), num_threads());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const Block block = block_of(i, p.rows, p.understanding);
      const float* weight = p.weights + block.stream * p.columns;
      for (int64_t row = block.begin; row < block.end; ++row) forward_row<T>(p, row, weight);
    }
  }
}

template <class T>
void backward(const RmsNormBackwardParams& p) {
  const int64_t bytes = p.rows * p.columns * static_cast<int64_t>(sizeof(T));
  const int64_t blocks = stream_blocks(p.rows, p.understanding), padded = padded_floats(p.columns);
  advise_huge_pages(p.ds, bytes);
#pragma omp parallel num_threads(threads_for(p.num_threads, p.rows * p.columns))
  {
    populate(p.ds, bytes, this_thread(), num_threads());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const Block block = block_of(i, p.rows, p.understanding);
      const bool needed = p.needs_weights[block.stream];
      if (!needed && p.ds == nullptr) continue;
      const float* weight = p.weights + block.stream * p.columns;
      const StagedSum sum = staged_sum(p.partials, i, blocks, padded, needed);
      sum.clear();
      for (int64_t row = block.begin; row < block.end; ++row) {
        backward_row<T>(p, row, weight, sum.terms);
        if ((row + 1 - block.begin) % kTermsPerStage == 0 || row + 1 == block.end) sum.fold();
      }
    }
    for (int64_t stream = 0; stream < 2; ++stream) {
      if (!p.needs_weights[stream]) continue;
      const BlockRange range = stream_range(stream, p.rows, p.understanding);
      float* out = p.dweights + stream * p.columns;
#pragma omp for schedule(static)
      for (int64_t d = 0; d < p.columns; d += kLanes) {
        const Floats total = sum_blocks(p.partials + d, padded, range);
        store_some(total, out + d, smaller(kLanes, p.columns - d));
      }
    }
  }
}

}  // namespace

namespace UNIGENDET_ISA {

void rms_norm(const RmsNormParams& p) {
  switch (p.x.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::bfloat16: return forward<Bfloat16>(p);
    case Dtype::float16: return forward<Float16>(p);
  }
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  switch (p.summed.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::bfloat16: return backward<Bfloat16>(p);
    case Dtype::float16: return backward<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
