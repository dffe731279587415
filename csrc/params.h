// What kernels are called with: pointers, sizes, strides. Plain data only; bindings.cpp fills it in and has checked it.
#pragma once

#include <stdint.h>

namespace unigendet {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// A matrix whose rows are contiguous.
struct Rows {
  const void* data;
  int64_t stride;  // elements from one row to the next
  Dtype dtype;
};

// The sizes of one image's two grids, and where its rows begin.
struct Image {
  int32_t h, w, teacher_h, teacher_w;
  int32_t student_row, teacher_row;
};

// Up to kTileTokens consecutive tokens of one image, starting at `token` of that image's h * w.
struct Tile {
  int32_t image, token;
};

constexpr int32_t kTileTokens = 32;

// N student rows, M teacher rows, D columns. On the CPU every pointer is to host memory, on CUDA to device memory.
struct AlignmentLossParams {
  Rows student;                // [N, D]
  Rows teacher;                // [M, D]
  int32_t student_rows, teacher_rows, columns;
  const Image* images;         // [num_images]
  int32_t num_images;
  const Tile* tiles;           // [num_tiles], CUDA only
  int32_t num_tiles;
  const float* normalizer;     // one number, or null for N
  const float* token_weights;  // [N], or null for ones
  float weight;
  bool unit_dstudent;          // whether the gradient is left without weight / normalizer
  bool unit_dteacher;

  float* loss;                 // one number
  float* means;                // [num_images]
  void* dstudent;              // [N, D] contiguous, of student's dtype, or null
  void* dteacher;              // [M, D] contiguous, of teacher's dtype, or null

  float* distances;            // workspace [N]: u (1 - c) of each row
  float* coefficients;         // workspace [N, 2], for dteacher only: those of dr, without weight / normalizer
  double* image_sums;          // workspace [num_images + 1], CUDA only; the last one holds a counter
  float* scratch;              // workspace of num_threads * scratch_floats(D), CPU only, 64-byte aligned
  int32_t num_threads;         // CPU only
  void* stream;                // CUDA only
};

// out = factor * gradient; `out` may be `gradient`.
struct ScaleParams {
  const void* gradient;  // [numel]
  void* out;             // [numel]
  const float* factor;   // one number
  int64_t numel;
  Dtype dtype;
  int32_t num_threads;   // CPU only
  void* stream;          // CUDA only
};

}  // namespace unigendet
