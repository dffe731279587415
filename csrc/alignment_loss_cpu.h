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
};

namespace baseline {
void alignment_loss(const AlignmentLossParams&);
void scale(const ScaleParams&);
}  // namespace baseline

#ifdef UNIGENDET_X86_LEVELS
namespace x86_64_v3 {
void alignment_loss(const AlignmentLossParams&);
void scale(const ScaleParams&);
}  // namespace x86_64_v3
namespace x86_64_v4 {
void alignment_loss(const AlignmentLossParams&);
void scale(const ScaleParams&);
}  // namespace x86_64_v4
#endif

// All that are built, the most demanding first; the last one runs everywhere.
#ifdef UNIGENDET_X86_LEVELS
// Every processor with AVX2 and FMA has F16C, whose name GCC before 11 and Clang before 18 do not know here.
static inline bool runs_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static inline bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
static inline bool runs_always() { return true; }

constexpr CpuKernels kCpuKernels[] = {
#ifdef UNIGENDET_X86_LEVELS
    {"x86-64-v4", runs_v4, x86_64_v4::alignment_loss, x86_64_v4::scale},
    {"x86-64-v3", runs_v3, x86_64_v3::alignment_loss, x86_64_v3::scale},
#endif
    {"baseline", runs_always, baseline::alignment_loss, baseline::scale},
};

// What one thread needs of AlignmentLossParams::scratch: two teacher columns, or the sum of one teacher gradient.
static constexpr int64_t scratch_floats(int64_t columns) { return 2 * ((columns + 15) / 16 * 16); }

}  // namespace unigendet
