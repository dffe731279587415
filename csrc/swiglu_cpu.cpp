// SwiGLU on the CPU: the maths stands in unigendet/ops/swiglu.py. Compiled once per instruction set, as
// alignment_loss_cpu.cpp is.
#include <stdint.h>

#include "cpu_kernels.h"
#include "rows_cpu.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

UNIGENDET_INLINE Floats logistic(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
void forward_row(const SwigluParams& p, int64_t row) {
  const T* gate = row_of<T>(p.gate_up, row);
  const T* up = gate + p.columns;
  T* out = static_cast<T*>(p.out) + row * p.columns;
  for_columns(p.columns, [&](int64_t d, auto lanes) {
    const Floats g = lanes.get(gate + d);
    lanes.put(g * logistic(g) * lanes.get(up + d), out + d);
  });
}

template <class T>
void backward_row(const SwigluBackwardParams& p, int64_t row) {
  const T* gate = row_of<T>(p.gate_up, row);
  const T* up = gate + p.columns;
  const T* dy = row_of<T>(p.dy, row);
  T* dgate = static_cast<T*>(p.gradient) + row * 2 * p.columns;
  T* dup = dgate + p.columns;
  for_columns(p.columns, [&](int64_t d, auto lanes) {
    const Floats g = lanes.get(gate + d), gradient = lanes.get(dy + d), sigma = logistic(g);
    lanes.put(gradient * lanes.get(up + d) * sigma * (1.0f + g * (1.0f - sigma)), dgate + d);
    lanes.put(gradient * g * sigma, dup + d);
  });
}

// step(row) for all rows, on some threads, which first fetch `written`, of `width` numbers of T per row.
template <class T, class Step>
void for_rows(int64_t rows, int64_t width, void* written, int32_t num_threads_at_most, Step step) {
  const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T)), chunks = blocks_of(rows);
  advise_huge_pages(written, bytes);
#pragma omp parallel num_threads(threads_for(num_threads_at_most, rows * width))
  {
    populate(written, bytes, this_thread(), num_threads());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t end = smaller((i + 1) * kBlockRows, rows);
      for (int64_t row = i * kBlockRows; row < end; ++row) step(row);
    }
  }
}

template <class T>
void forward(const SwigluParams& p) {
  for_rows<T>(p.rows, p.columns, p.out, p.num_threads, [&p](int64_t row) { forward_row<T>(p, row); });
}

template <class T>
void backward(const SwigluBackwardParams& p) {
  for_rows<T>(p.rows, 2 * p.columns, p.gradient, p.num_threads, [&p](int64_t row) { backward_row<T>(p, row); });
}

}  // namespace

namespace UNIGENDET_ISA {

void swiglu(const SwigluParams& p) {
  switch (p.gate_up.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::bfloat16: return forward<Bfloat16>(p);
    case Dtype::float16: return forward<Float16>(p);
  }
}

void swiglu_backward(const SwigluBackwardParams& p) {
  switch (p.gate_up.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::bfloat16: return backward<Bfloat16>(p);
    case Dtype::float16: return backward<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
