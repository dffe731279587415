// Products of small matrices of floats, whose operands lie in the caches; and what brings matrices into their form.
//
// A matrix that a product reads or writes has rows of whole vectors; what lies behind its last column does not matter. All
// functions have internal linkage: they are compiled once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

// A product is cut into pieces of kPieceRows rows and up to kPieceVectors vectors, whose sums fit into the registers. They are
// computed in vectors of a register's size: GCC would keep an array of larger ones in memory.
#if defined(__AVX512F__)
constexpr int kRegisterFloats = 16, kPieceRows = 8, kPieceVectors = 3;
#elif defined(__AVX2__)
constexpr int kRegisterFloats = 8, kPieceRows = 6, kPieceVectors = 1;
#elif defined(__aarch64__)
constexpr int kRegisterFloats = 4, kPieceRows = 4, kPieceVectors = 1;
#else
constexpr int kRegisterFloats = 4, kPieceRows = 2, kPieceVectors = 1;
#endif
typedef float Register __attribute__((vector_size(kRegisterFloats * 4)));

// One piece: c = a b, or c += a b. a has `step` floats from one term of the sum to the next and `row` from one row of c to
// the next: one of the two is 1.
template <int rows, int vectors, bool transposed>
inline __attribute__((always_inline)) void multiply_piece(int64_t terms, const float* a, const float* b, float* c,
                                                          int64_t c_stride, bool add) {
  constexpr int64_t row = transposed ? 1 : kStride, step = transposed ? kStride : 1;
  constexpr int width = vectors * static_cast<int>(kLanes) / kRegisterFloats;
  Register sums[rows][width] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Register right[width];
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) memcpy(&right[j], b + k * kStride + j * kRegisterFloats, sizeof right[j]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const float left = a[k * step + i * row];
#pragma GCC unroll 16
      for (int j = 0; j < width; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) {
      // Added at the end: many terms that were added to a large sum one by one would lose more.
      float* to = c + i * c_stride + j * kRegisterFloats;
      Register before = {};
      if (add) memcpy(&before, to, sizeof before);
      const Register sum = before + sums[i][j];
      memcpy(to, &sum, sizeof sum);
    }
  }
}

// The rows of c in pieces, the last ones in smaller ones.
template <int vectors, bool transposed>
void multiply_columns(int64_t rows, int64_t terms, const float* a, const float* b, float* c, int64_t c_stride,
                      bool add) {
  constexpr int64_t a_row = transposed ? 1 : kStride;
  int64_t i = 0;
  for (; i + kPieceRows <= rows; i += kPieceRows) {
    multiply_piece<kPieceRows, vectors, transposed>(terms, a + i * a_row, b, c + i * c_stride, c_stride, add);
  }
  for (; i + 2 <= rows; i += 2) {
    multiply_piece<2, vectors, transposed>(terms, a + i * a_row, b, c + i * c_stride, c_stride, add);
  }
  for (; i < rows; ++i) {
    multiply_piece<1, vectors, transposed>(terms, a + i * a_row, b, c + i * c_stride, c_stride, add);
  }
}

// c = a b, or c += a b, with c [rows, 16 vectors] of its stride, and b [terms, 16 vectors] and a [rows, terms], or if it is
// transposed [terms, rows], of kStride.
template <bool transposed>
void multiply(int64_t rows, int64_t vectors, int64_t terms, const float* a, const float* b, float* c, int64_t c_stride,
              bool add) {
  int64_t pieces = (vectors + kPieceVectors - 1) / kPieceVectors;
  while (vectors > 0) {
    const int64_t width = (vectors + pieces - 1) / pieces;  // about the same for all
    if constexpr (kPieceVectors >= 3) {
      if (width == 3) multiply_columns<3, transposed>(rows, terms, a, b, c, c_stride, add);
      if (width == 2) multiply_columns<2, transposed>(rows, terms, a, b, c, c_stride, add);
    }
    if (width == 1) multiply_columns<1, transposed>(rows, terms, a, b, c, c_stride, add);
    vectors -= width, --pieces, b += width * kLanes, c += width * kLanes;
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// 8 rows of 8 floats, 16 floats from one row to the next.
UNIGENDET_INLINE void transpose_eight(const float* from, float* to) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(from + i * kLanes);
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * kLanes, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kLanes, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
}
#endif

// 16 vectors, element j of vector i and element i of vector j exchanged.
UNIGENDET_INLINE void transpose(Floats (&x)[kLanes]) {
#if defined(__AVX512F__)
  // Vectors exchange their elements, then pairs of them, within the four lanes of 128 bits; then the lanes move. (With
  // masks: without, GCC's header reads a variable that it has not set, and warns.)
  constexpr __mmask16 all = static_cast<__mmask16>(0xffff);
  constexpr __mmask8 all_pairs = static_cast<__mmask8>(0xff);
  Floats y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    y[i] = (Floats)_mm512_maskz_unpacklo_ps(all, (__m512)x[i], (__m512)x[i + 1]);
    y[i + 1] = (Floats)_mm512_maskz_unpackhi_ps(all, (__m512)x[i], (__m512)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = (__m512d)y[i + j], high = (__m512d)y[i + j + 2];
      x[i + 2 * j] = (Floats)_mm512_maskz_unpacklo_pd(all_pairs, low, high);
      x[i + 2 * j + 1] = (Floats)_mm512_maskz_unpackhi_pd(all_pairs, low, high);
    }
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = half; i < half + 4; ++i) {
      y[i] = (Floats)_mm512_maskz_shuffle_f32x4(all, (__m512)x[i], (__m512)x[i + 4], 0x88);
      y[i + 4] = (Floats)_mm512_maskz_shuffle_f32x4(all, (__m512)x[i], (__m512)x[i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = (Floats)_mm512_maskz_shuffle_f32x4(all, (__m512)y[i], (__m512)y[i + 8], 0x88);
    x[i + 8] = (Floats)_mm512_maskz_shuffle_f32x4(all, (__m512)y[i], (__m512)y[i + 8], 0xdd);
  }
#else
  float from[kLanes][kLanes], to[kLanes][kLanes];
  memcpy(from, x, sizeof from);
#if defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8) {
    for (int j = 0; j < kLanes; j += 8) transpose_eight(&from[i][j], &to[j][i]);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j][i] = from[i][j];
  }
#endif
  memcpy(x, to, sizeof to);
#endif
}

// The d-th vector of a row, times `factor`; zeros from column `columns` on.
template <class T>
UNIGENDET_INLINE Floats scaled_vector(const T* row, int64_t d, int64_t columns, float factor) {
  return factor * (d + kLanes <= columns ? load(row + d) : load_some(row + d, columns - d));
}

}  // namespace
}  // namespace unigendet
