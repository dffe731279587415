// The host build: one set of functions per instruction set, and the choice among them. All but the entry points have
// internal linkage: the linker must not take one instruction set's copy for all.
#pragma once

#include <stdint.h>

#include "params.h"

namespace unigendet {

struct CpuKernels {
  const char* isa;
  bool (*supported)();
  void (*alignment_loss)(const AlignmentLossParams&);
  void (*scale)(const ScaleParams&);
  void (*qk_norm_rope)(const QkNormRopeParams&);
  void (*qk_norm_rope_backward)(const QkNormRopeBackwardParams&);
  void (*rms_norm)(const RmsNormParams&);
  void (*rms_norm_backward)(const RmsNormBackwardParams&);
  void (*swiglu)(const SwigluParams&);
  void (*swiglu_backward)(const SwigluBackwardParams&);
  void (*attention)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
};

#define UNIGENDET_ENTRY_POINTS(isa)                              \
  namespace isa {                                                \
  void alignment_loss(const AlignmentLossParams&);               \
  void scale(const ScaleParams&);                                \
  void qk_norm_rope(const QkNormRopeParams&);                    \
  void qk_norm_rope_backward(const QkNormRopeBackwardParams&);   \
  void rms_norm(const RmsNormParams&);                           \
  void rms_norm_backward(const RmsNormBackwardParams&);          \
  void swiglu(const SwigluParams&);                              \
  void swiglu_backward(const SwigluBackwardParams&);             \
  void attention(const AttentionParams&);                        \
  void attention_backward(const AttentionBackwardParams&);       \
  }
#define UNIGENDET_KERNELS(name, supported, isa)                                                                    \
  {                                                                                                                \
    name, supported, isa::alignment_loss, isa::scale, isa::qk_norm_rope, isa::qk_norm_rope_backward, isa::rms_norm, \
        isa::rms_norm_backward, isa::swiglu, isa::swiglu_backward, isa::attention, isa::attention_backward         \
  }

UNIGENDET_ENTRY_POINTS(baseline)
#ifdef UNIGENDET_X86_LEVELS
UNIGENDET_ENTRY_POINTS(x86_64_v3)
UNIGENDET_ENTRY_POINTS(x86_64_v4)

// Every processor with AVX2 and FMA has F16C, whose name GCC before 11 and Clang before 18 do not know here.
static inline bool runs_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static inline bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
static inline bool runs_always() { return true; }

// All that are built, the most demanding first; the last one runs everywhere.
constexpr CpuKernels kCpuKernels[] = {
#ifdef UNIGENDET_X86_LEVELS
    UNIGENDET_KERNELS("x86-64-v4", runs_v4, x86_64_v4),
    UNIGENDET_KERNELS("x86-64-v3", runs_v3, x86_64_v3),
#endif
    UNIGENDET_KERNELS("baseline", runs_always, baseline),
};

#undef UNIGENDET_ENTRY_POINTS
#undef UNIGENDET_KERNELS

// n floats, and those behind them that fill the last vector.
static constexpr int64_t padded_floats(int64_t n) { return (n + 15) / 16 * 16; }

// What one thread needs of AlignmentLossParams::scratch: two teacher columns, or the sum of one teacher gradient.
static constexpr int64_t scratch_floats(int64_t columns) { return 2 * padded_floats(columns); }

// Rows whose shares of the weights' gradients are summed in one block. The blocks' sums are then added in their order,
// so the result depends on the rows alone and not on who computes a block.
constexpr int64_t kBlockRows = 64;

// Blocks of stream-major rows: none holds rows of both streams.
static constexpr int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
static constexpr int64_t stream_blocks(int64_t rows, int64_t understanding) {
  return blocks_of(understanding) + blocks_of(rows - understanding);
}

// The floats of RmsNormBackwardParams::partials and QkNormRopeBackwardParams::partials: one sum per block, and one that
// each thread works in.
static constexpr int64_t rms_norm_partials(int64_t rows, int64_t understanding, int64_t columns, int64_t num_threads) {
  return (stream_blocks(rows, understanding) + num_threads) * padded_floats(columns);
}
static constexpr int64_t qk_norm_rope_partials(int64_t rows, int64_t understanding, int64_t head_dim,
                                               int64_t num_threads) {
  return (stream_blocks(rows, understanding) + num_threads) * 4 * padded_floats(head_dim / 2);
}

// Floats from one row to the next of the matrices that attention multiplies: for up to 128 columns, and not a power of two,
// at which rows would fall onto each other in the caches.
constexpr int64_t kStride = 144;

// The heads that a tile of the forward pass holds of each query: all of a group, so that they share what is done for keys.
static constexpr int64_t heads_of_tile(const AttentionInputs& in) {
  return in.q_heads / in.kv_heads <= kTileRows ? in.q_heads / in.kv_heads : 1;
}

// Attention's workspaces.
static constexpr int64_t attention_scratch() {
  return (3 * kTileRows + kMaxHeadDim + kBlockKeys) * kStride + 2 * kTileRows + 2 * kBlockKeys;
}
static constexpr int64_t attention_backward_scratch() {
  return (4 * kTileRows + 2 * kMaxHeadDim + 3 * kBlockKeys) * kStride + 2 * kBlockKeys;
}
static constexpr int64_t attention_dq_floats(int64_t rows, int64_t q_heads, int64_t head_dim) {
  return rows * q_heads * padded_floats(head_dim);
}

}  // namespace unigendet
