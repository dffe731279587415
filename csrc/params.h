// What kernels are called with: pointers, sizes, strides. Plain data only; the bindings fill it in and have checked it.
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

// The ops on stream-major rows, of which the first `understanding` are one stream's and the others the other's. CPU only.
// Outputs are contiguous and of the inputs' dtype; weights and all sums are float32.
struct RmsNormParams {
  Rows x;                 // [rows, columns]
  Rows residual;          // [rows, columns], or with null data
  const float* weights;   // [2, columns], of each stream
  int64_t rows, understanding, columns;
  float eps;
  void* normed;           // [rows, columns]
  void* summed;           // [rows, columns], with a residual only
  float* rstd;            // [rows]
  int32_t num_threads;
};

struct RmsNormBackwardParams {
  Rows dy;                // [rows, columns]
  Rows dsummed;           // [rows, columns], or with null data
  Rows summed;            // [rows, columns]
  const float* rstd;      // [rows]
  const float* weights;   // [2, columns]
  int64_t rows, understanding, columns;
  void* ds;               // [rows, columns], or null
  float* dweights;        // [2, columns]
  bool needs_weights[2];  // which rows of dweights are wanted
  float* partials;        // workspace of rms_norm_partials() floats, 64-byte aligned
  int32_t num_threads;
};

struct SwigluParams {
  Rows gate_up;  // [rows, 2 * columns]
  int64_t rows, columns;
  void* out;     // [rows, columns]
  int32_t num_threads;
};

struct SwigluBackwardParams {
  Rows dy;         // [rows, columns]
  Rows gate_up;    // [rows, 2 * columns]
  int64_t rows, columns;
  void* gradient;  // [rows, 2 * columns]
  int32_t num_threads;
};

// [rows, heads, head_dim], each head contiguous.
struct Heads {
  const void* data;
  int64_t row_stride, head_stride;
};

// What both directions of qk_norm_rope read. Every index in its tables has been checked.
struct QkNormRopeInputs {
  Rows qkv;                  // [rows, (q_heads + 2 * kv_heads) * head_dim]
  const float* weights;      // [4, head_dim]: q's of each stream, k's of each stream
  const float* cos;          // [positions, head_dim / 2]
  const float* sin;
  const int64_t* rows_map;   // [rows]: forward, the stream-major row of each in sequence order; backward, the inverse
  const int64_t* positions;  // [rows], in sequence order
  int64_t rows, understanding, q_heads, kv_heads, head_dim;
  float eps;
};

struct QkNormRopeParams {
  QkNormRopeInputs inputs;
  void* q;  // [rows, q_heads, head_dim], in sequence order, as k and v [rows, kv_heads, head_dim]
  void* k;
  void* v;
  int32_t num_threads;
};

struct QkNormRopeBackwardParams {
  QkNormRopeInputs inputs;
  Heads dq, dk, dv;
  void* dqkv;             // as qkv, or null
  float* dweights;        // [4, head_dim]
  bool needs_weights[2];  // of which stream the rows of dweights are wanted
  float* partials;        // workspace of qk_norm_rope_partials() floats, 64-byte aligned
  int32_t num_threads;
};

// Attention cuts the rows of each sample into tiles of queries and blocks of keys (attention_plan.h). CPU only.
constexpr int32_t kTileRows = 128;  // at most, of which a query has one or, in the forward pass, one for each head of a group
constexpr int32_t kBlockKeys = 64;  // at most
constexpr int32_t kMaxHeadDim = 128;

// Query rows [begin, end), and the blocks of their sample. The sample has `parts` parts of dq: the first lies in the rows of
// the queries, each other in rows of its own, of which `begin` has number `more` in the second part, and the next parts are
// `sample_queries` rows apart.
struct AttentionTile {
  int32_t begin, end, first_block, end_block;
  int32_t parts;
  int64_t more, sample_queries;
};

// Key rows [begin, end); the least and the largest query_begin and query_end among them; the tiles of their sample.
struct AttentionBlock {
  int32_t begin, end, least_begin, most_begin, least_end, most_end, first_tile, end_tile;
};

// Blocks of a sample that one thread computes the gradients of, adding to that part of its dq.
struct AttentionTask {
  int32_t first_block, end_block, part;
  int64_t pairs;
};

// What both directions of attention read. A query i sees a key j if query_begin[j] <= i < query_end[j].
struct AttentionInputs {
  Heads q;                     // [queries, q_heads, head_dim]
  Heads k, v;                  // [keys, kv_heads, head_dim]
  Dtype dtype;
  const int32_t* query_begin;  // [keys]
  const int32_t* query_end;    // [keys]
  const int64_t* out_rows;     // [queries]: the row of each query in out and its gradient, or null for the same row
  int64_t queries, keys, q_heads, kv_heads, head_dim;
  float scale;
  const AttentionTile* tiles;
  int64_t num_tiles;
  const AttentionBlock* blocks;
  int32_t num_threads;
};

struct AttentionParams {
  AttentionInputs inputs;
  void* out;       // [queries, q_heads, head_dim], contiguous, of q's dtype
  float* lse;      // [q_heads, queries]
  float* scratch;  // workspace of num_threads * attention_scratch() floats, 64-byte aligned
};

struct AttentionBackwardParams {
  AttentionInputs inputs;
  Heads dout, out;  // [queries, q_heads, head_dim], of q's dtype
  const float* lse;   // [q_heads, queries]
  const float* dlse;  // [q_heads, queries], or null for zeros
  const AttentionTask* tasks;
  int64_t num_tasks;
  void* dq;           // [queries, q_heads, head_dim], contiguous, as dk and dv [keys, kv_heads, head_dim]
  void* dk;
  void* dv;
  float* delta;       // workspace [q_heads, queries]
  bool sums_in_dq;    // whether the first parts of dq are summed in dq itself: of floats, and heads of whole vectors
  float* first_parts; // workspace of attention_dq_floats(queries) floats, 64-byte aligned, or null if they are in dq
  float* more_parts;  // workspace of attention_dq_floats(more_rows) floats, 64-byte aligned
  int64_t more_rows;
  float* scratch;     // workspace of num_threads * attention_backward_scratch() floats, 64-byte aligned
};

}  // namespace unigendet
