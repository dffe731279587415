// What the programs of `make sanitize` share: matrices in memory that ends where their last number does, with NaN in the
// gaps between rows, so that a stray access is seen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../../csrc/alignment_loss.cuh"
#include "../../csrc/params.h"

namespace unigendet {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline double read(const char* p, Dtype dtype) {
  if (dtype == Dtype::float32) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
  }
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return dtype == Dtype::bfloat16 ? to_float(Bfloat16{bits}) : to_float(Float16{bits});
}

inline void write(float value, char* p, Dtype dtype) {
  if (dtype == Dtype::float32) {
    memcpy(p, &value, sizeof value);
  } else if (dtype == Dtype::bfloat16) {
    Bfloat16 narrow;
    from_float(value, &narrow);
    memcpy(p, &narrow, sizeof narrow);
  } else {
    Float16 narrow;
    from_float(value, &narrow);
    memcpy(p, &narrow, sizeof narrow);
  }
}

// What `value` becomes in `dtype`; never decreasing in `value`.
inline double rounded(double value, Dtype dtype) {
  char memory[sizeof(float)];
  write(static_cast<float>(value), memory, dtype);
  return read(memory, dtype);
}

// A matrix in memory of exactly its extent, filled with NaN; its first number is `shift` numbers past a multiple of 64
// bytes.
struct Matrix {
  int64_t rows = 0, columns = 0, stride = 0, bytes = 0;
  Dtype dtype = Dtype::float32;
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  char* data = nullptr;

  Matrix() = default;
  Matrix(int64_t rows_, int64_t columns_, int64_t stride_, Dtype dtype_, int64_t shift)
      : rows(rows_), columns(columns_), stride(stride_), bytes(((rows_ - 1) * stride_ + columns_) * size_of(dtype_)),
        dtype(dtype_) {
    void* start = nullptr;
    if (posix_memalign(&start, 64, static_cast<size_t>(bytes + shift * size_of(dtype))) != 0) std::abort();
    memory.reset(static_cast<char*>(start));
    data = memory.get() + shift * size_of(dtype);
    for (int64_t i = 0; i < bytes; i += size_of(dtype)) write(kNaN, data + i, dtype);
  }
  char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * size_of(dtype); }
  double value(int64_t row, int64_t column) const { return read(at(row, column), dtype); }
  Rows view() const { return {data, stride, dtype}; }

  std::vector<double> values() const {
    std::vector<double> all;
    all.reserve(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < columns; ++d) all.push_back(value(row, d));
    }
    return all;
  }
  bool operator==(const Matrix& other) const {
    return bytes == other.bytes && memcmp(data, other.data, static_cast<size_t>(bytes)) == 0;
  }
};

}  // namespace unigendet
