// What the programs of `make sanitize` that draw their cases share: random matrices, workspaces, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/params.h"
#include "fuzz.h"

namespace unigendet {

inline double epsilon_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 0x1p-24 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-11;
}

// Random numbers, and matrices of them.
struct Source {
  std::mt19937 random;
  Dtype dtype = Dtype::float32;
  int64_t shift = 0;

  explicit Source(unsigned seed) : random(seed) {
    dtype = kDtypes[integer(0, 2)];
    shift = integer(0, 3);
  }
  int64_t integer(int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); }
  Matrix matrix(int64_t rows, int64_t columns, int64_t stride, Dtype type, float scale = 1.0f) {
    Matrix m(rows, columns, stride, type, shift);
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < rows; ++row) {
      const float row_scale = integer(0, 19) == 0 ? 0.0f : scale;
      for (int64_t d = 0; d < columns; ++d) write(row_scale * normal(random), m.at(row, d), type);
    }
    return m;
  }
  Matrix input(int64_t rows, int64_t columns, float scale = 1.0f) {
    return matrix(rows, columns, columns + integer(0, 5), dtype, scale);
  }
  Matrix floats(int64_t rows, int64_t columns) { return matrix(rows, columns, columns, Dtype::float32); }
  Matrix output(int64_t rows, int64_t columns) const { return Matrix(rows, columns, columns, dtype, shift); }
  std::vector<int64_t> permutation(int64_t n) {
    std::vector<int64_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[size_t(i)] = i;
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }
};

inline const float* floats_of(const Matrix& m) { return reinterpret_cast<const float*>(m.data); }
inline float* floats_of(Matrix& m) { return reinterpret_cast<float*>(m.data); }

// A workspace of exactly these floats, all NaN.
using Floats = std::unique_ptr<float, void (*)(void*)>;
inline Floats workspace(int64_t n) {
  Floats floats(static_cast<float*>(std::aligned_alloc(64, size_t(n) * sizeof(float))), std::free);
  std::fill_n(floats.get(), n, kNaN);
  return floats;
}

// One number: it may be `error` off before it is rounded to its dtype, which happens `roundings` times.
inline bool within(const char* name, const Matrix& have, int64_t row, int64_t d, double want, double error,
                   int roundings = 1) {
  const double value = have.value(row, d);
  const double smallest = have.dtype == Dtype::float16 ? 0x1p-24 : 1e-37;
  const double tolerance = error + roundings * (1.01 * epsilon_of(have.dtype) * std::fabs(want) + smallest);
  if (std::fabs(value - want) <= tolerance || value == rounded(want, have.dtype)) return true;
  std::printf("%s[%lld, %lld] is %.9g; it must be %.9g (+- %.3g)\n", name, (long long)row, (long long)d, value, want,
              tolerance);
  return false;
}

using Results = std::vector<Matrix>;

inline bool same(const Results& a, const Results& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    std::printf("results depend on the number of threads\n");
    return false;
  }
  return true;
}

// compute(threads) twice; the first result must pass check, the second be the same.
template <class Compute, class Check>
bool run(Source& source, const Compute& compute, const Check& check) {
  const Results one = compute(1);
  return check(one) & same(compute(int32_t(source.integer(2, 4))), one);
}

}  // namespace unigendet
