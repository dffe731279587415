// Per-head norm, RoPE and the change of order on the CPU: the maths stands in unigendet/ops/qk_norm_rope.py. Compiled once
// per instruction set, as alignment_loss_cpu.cpp is.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"
#include "rows_cpu.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

// A position's angles.
struct Angles {
  const float* cos;
  const float* sin;
};

UNIGENDET_INLINE Angles angles_of(const QkNormRopeInputs& in, int64_t sequence_row) {
  const int64_t start = in.positions[sequence_row] * (in.head_dim / 2);
  return {in.cos + start, in.sin + start};
}

// 1 / RMS, from the sum of squares.
UNIGENDET_INLINE float rstd_of(float squares, int64_t count, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(count) + eps);
}

template <class T>
UNIGENDET_INLINE void norm_rope(const T* x, const float* weight, Angles angles, T* y, int64_t half, float eps) {
  Floats squares = {};
  for_columns(half, [&](int64_t d, auto lanes) {
    const Floats first = lanes.get(x + d), second = lanes.get(x + half + d);
    squares += first * first + second * second;
  });
  const float rstd = rstd_of(sum(squares), 2 * half, eps);
  for_columns(half, [&](int64_t d, auto lanes) {
    const Floats first = lanes.get(weight + d) * (lanes.get(x + d) * rstd);
    const Floats second = lanes.get(weight + half + d) * (lanes.get(x + half + d) * rstd);
    const Floats c = lanes.get(angles.cos + d), s = lanes.get(angles.sin + d);
    lanes.put(first * c - second * s, y + d);
    lanes.put(second * c + first * s, y + half + d);
  });
}

// Sequence rows [begin, end). kHalf is head_dim / 2, or 0 if that is known at run time only.
template <class T, int64_t kHalf>
void forward_rows(const QkNormRopeParams& p, int64_t begin, int64_t end) {
  const QkNormRopeInputs& in = p.inputs;
  const int64_t half = kHalf > 0 ? kHalf : in.head_dim / 2, head_dim = 2 * half;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = in.rows_map[row];
    const T* x = row_of<T>(in.qkv, from);
    const Angles angles = angles_of(in, row);
    const float* weight = in.weights + (from < in.understanding ? 0 : head_dim);
    T* q = static_cast<T*>(p.q) + row * in.q_heads * head_dim;
    for (int64_t head = 0; head < in.q_heads; ++head, x += head_dim, q += head_dim) {
      norm_rope(x, weight, angles, q, half, in.eps);
    }
    weight += 2 * head_dim;
    T* k = static_cast<T*>(p.k) + row * in.kv_heads * head_dim;
    for (int64_t head = 0; head < in.kv_heads; ++head, x += head_dim, k += head_dim) {
      norm_rope(x, weight, angles, k, half, in.eps);
    }
    const int64_t width = in.kv_heads * head_dim;
    memcpy(static_cast<T*>(p.v) + row * width, x, static_cast<size_t>(width) * sizeof(T));
  }
}

// One head: dx unless it is null, and the weight's gradient added to dweight unless that is null, whose second half
// begins at padded_floats(half).
template <class T>
UNIGENDET_INLINE void head_backward(const T* dy, const T* x, const float* weight, Angles angles, T* dx, float* dweight,
                                    int64_t half, float eps) {
  const auto rotated_back = [&](int64_t d, auto lanes, Floats* first, Floats* second) {
    const Floats c = lanes.get(angles.cos + d), s = lanes.get(angles.sin + d);
    const Floats dy_first = lanes.get(dy + d), dy_second = lanes.get(dy + half + d);
    *first = dy_first * c + dy_second * s;
    *second = dy_second * c - dy_first * s;
  };
  Floats squares = {}, products = {};
  for_columns(half, [&](int64_t d, auto lanes) {
    Floats first, second;
    rotated_back(d, lanes, &first, &second);
    const Floats x_first = lanes.get(x + d), x_second = lanes.get(x + half + d);
    squares += x_first * x_first + x_second * x_second;
    products += first * lanes.get(weight + d) * x_first + second * lanes.get(weight + half + d) * x_second;
  });
  const float rstd = rstd_of(sum(squares), 2 * half, eps);
  const float mean = rstd * sum(products) / static_cast<float>(2 * half);
  for_columns(half, [&](int64_t d, auto lanes) {
    Floats first, second;
    rotated_back(d, lanes, &first, &second);
    const Floats h_first = lanes.get(x + d) * rstd, h_second = lanes.get(x + half + d) * rstd;
    if (dx != nullptr) {
      lanes.put(rstd * (lanes.get(weight + d) * first - h_first * mean), dx + d);
      lanes.put(rstd * (lanes.get(weight + half + d) * second - h_second * mean), dx + half + d);
    }
    if (dweight != nullptr) {
      float* second_half = dweight + padded_floats(half);
      store(load(dweight + d) + first * h_first, dweight + d);
      store(load(second_half + d) + second * h_second, second_half + d);
    }
  });
}

// The stream-major rows of one block; the weights' gradients are added to `sum`, q's and behind them k's.
template <class T, int64_t kHalf>
void backward_block(const QkNormRopeBackwardParams& p, const Block& block, const StagedSum& sum) {
  const QkNormRopeInputs& in = p.inputs;
  const int64_t half = kHalf > 0 ? kHalf : in.head_dim / 2, head_dim = 2 * half;
  const int64_t width = (in.q_heads + 2 * in.kv_heads) * head_dim;
  float* const terms[2] = {sum.terms, sum.terms == nullptr ? nullptr : sum.terms + 2 * padded_floats(half)};
  const Heads gradients[2] = {p.dq, p.dk};
  const int64_t heads[2] = {in.q_heads, in.kv_heads};
  const int64_t rows_per_stage = in.q_heads < kTermsPerStage ? kTermsPerStage / in.q_heads : 1;
  sum.clear();
  for (int64_t row = block.begin; row < block.end; ++row) {
    const int64_t sequence_row = in.rows_map[row];
    const Angles angles = angles_of(in, sequence_row);
    const T* x = row_of<T>(in.qkv, row);
    T* dx = p.dqkv == nullptr ? nullptr : static_cast<T*>(p.dqkv) + row * width;
    for (int64_t part = 0; part < 2; ++part) {
      const float* weight = in.weights + (2 * part + block.stream) * head_dim;
      const T* dy = static_cast<const T*>(gradients[part].data) + sequence_row * gradients[part].row_stride;
      for (int64_t head = 0; head < heads[part]; ++head, x += head_dim, dy += gradients[part].head_stride) {
        head_backward(dy, x, weight, angles, dx, terms[part], half, in.eps);
        if (dx != nullptr) dx += head_dim;
      }
    }
    if ((row + 1 - block.begin) % rows_per_stage == 0 || row + 1 == block.end) sum.fold();
    if (dx == nullptr) continue;
    const T* dv = static_cast<const T*>(p.dv.data) + sequence_row * p.dv.row_stride;
    for (int64_t head = 0; head < in.kv_heads; ++head, dx += head_dim, dv += p.dv.head_stride) {
      memcpy(dx, dv, static_cast<size_t>(head_dim) * sizeof(T));
    }
  }
}

template <class T, int64_t kHalf>
void forward(const QkNormRopeParams& p) {
  const QkNormRopeInputs& in = p.inputs;
  const int64_t item = static_cast<int64_t>(sizeof(T)), chunks = blocks_of(in.rows);
  void* const outputs[3] = {p.q, p.k, p.v};
  int64_t bytes[3];
  for (int i = 0; i < 3; ++i) bytes[i] = in.rows * (i == 0 ? in.q_heads : in.kv_heads) * in.head_dim * item;
  for (int i = 0; i < 3; ++i) advise_huge_pages(outputs[i], bytes[i]);
  const int64_t numbers = in.rows * (in.q_heads + 2 * in.kv_heads) * in.head_dim;
#pragma omp parallel num_threads(threads_for(p.num_threads, numbers))
  {
    for (int i = 0; i < 3; ++i) populate(outputs[i], bytes[i], this_thread(), num_threads());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) {
      forward_rows<T, kHalf>(p, i * kBlockRows, smaller((i + 1) * kBlockRows, in.rows));
    }
  }
}

template <class T, int64_t kHalf>
void backward(const QkNormRopeBackwardParams& p) {
  const QkNormRopeInputs& in = p.inputs;
  const int64_t numbers = in.rows * (in.q_heads + 2 * in.kv_heads) * in.head_dim;
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(T));
  const int64_t half = in.head_dim / 2, padded = padded_floats(half);
  const int64_t blocks = stream_blocks(in.rows, in.understanding);
  advise_huge_pages(p.dqkv, bytes);
#pragma omp parallel num_threads(threads_for(p.num_threads, numbers))
  {
    populate(p.dqkv, bytes, this_thread(), num_threads());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const Block block = block_of(i, in.rows, in.understanding);
      const bool needed = p.needs_weights[block.stream];
      if (!needed && p.dqkv == nullptr) continue;
      backward_block<T, kHalf>(p, block, staged_sum(p.partials, i, blocks, 4 * padded, needed));
    }
  }
  for (int64_t stream = 0; stream < 2; ++stream) {
    if (!p.needs_weights[stream]) continue;
    const BlockRange blocks_of_stream = stream_range(stream, in.rows, in.understanding);
    for (int64_t part = 0; part < 4; ++part) {  // q's halves, k's halves
      float* out = p.dweights + (part / 2 * 2 + stream) * in.head_dim + part % 2 * half;
      for_columns(half, [&](int64_t d, auto lanes) {
        lanes.put(sum_blocks(p.partials + part * padded + d, 4 * padded, blocks_of_stream), out + d);
      });
    }
  }
}

// The widths of heads that models have are known to the compiler.
#define UNIGENDET_BY_WIDTH(function, head_dim, ...)     \
  switch (head_dim) {                                   \
    case 32: return function<T, 16>(__VA_ARGS__);       \
    case 64: return function<T, 32>(__VA_ARGS__);       \
    case 128: return function<T, 64>(__VA_ARGS__);      \
    default: return function<T, 0>(__VA_ARGS__);        \
  }

template <class T>
void forward_of(const QkNormRopeParams& p) {
  UNIGENDET_BY_WIDTH(forward, p.inputs.head_dim, p)
}

template <class T>
void backward_of(const QkNormRopeBackwardParams& p) {
  UNIGENDET_BY_WIDTH(backward, p.inputs.head_dim, p)
}

}  // namespace

namespace UNIGENDET_ISA {

void qk_norm_rope(const QkNormRopeParams& p) {
  switch (p.inputs.qkv.dtype) {
    case Dtype::float32: return forward_of<float>(p);
    case Dtype::bfloat16: return forward_of<Bfloat16>(p);
    case Dtype::float16: return forward_of<Float16>(p);
  }
}

void qk_norm_rope_backward(const QkNormRopeBackwardParams& p) {
  switch (p.inputs.qkv.dtype) {
    case Dtype::float32: return backward_of<float>(p);
    case Dtype::bfloat16: return backward_of<Bfloat16>(p);
    case Dtype::float16: return backward_of<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
