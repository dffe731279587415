// The arithmetic of the alignment loss, for the host and for CUDA: its maths stands in unigendet/ops/alignment_loss.py.
//
// All functions have internal linkage: the host build compiles them once per instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define UNIGENDET_INLINE static __host__ __device__ __forceinline__
#else
#define UNIGENDET_INLINE static inline __attribute__((always_inline))
#endif

namespace unigendet {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float kEpsilon = 1e-8f;

UNIGENDET_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

UNIGENDET_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

UNIGENDET_INLINE float to_float(float x) { return x; }

UNIGENDET_INLINE float to_float(Bfloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

UNIGENDET_INLINE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x0400u) return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
#endif
}

UNIGENDET_INLINE void from_float(float value, float* out) { *out = value; }

// Round to nearest, ties to even; NaN stays NaN.
UNIGENDET_INLINE void from_float(float value, Bfloat16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of_float(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

UNIGENDET_INLINE void from_float(float value, Float16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more; what lies between 65504 and it is rounded below
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal in float16
    half = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 leaves the multiples of 2^-24 in the low bits, rounded by the addition itself
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// The two source positions of one output position, along one side. `fraction` weighs `upper`; 0 means: do not read it.
struct Tap {
  int32_t lower, upper;
  float fraction;
};

// As F.interpolate(mode="bilinear", align_corners=False) places output `i` of `size` over `source` inputs.
UNIGENDET_INLINE Tap tap(int32_t i, int32_t size, int32_t source) {
  const float scale = static_cast<float>(source) / static_cast<float>(size);
  float position = scale * (static_cast<float>(i) + 0.5f) - 0.5f;
  position = position > 0.0f ? position : 0.0f;
  // Compared as floats: for a source of nearly 2^31, position may round to a number that no int32 holds.
  const int32_t lower = position < static_cast<float>(source - 1) ? static_cast<int32_t>(position) : source - 1;
  const int32_t upper = lower + 1 < source - 1 ? lower + 1 : source - 1;
  return {lower, upper, upper == lower ? 0.0f : position - static_cast<float>(lower)};
}

// The weight of source position `source_index` in `t`.
UNIGENDET_INLINE float weight_of(Tap t, int32_t source_index) {
  if (t.lower == source_index) return 1.0f - t.fraction;
  return t.upper == source_index ? t.fraction : 0.0f;
}

// Outputs that may read source position `j`: [begin, end), one too many at most on each side of what the maths gives.
struct Range {
  int32_t begin, end;
};

UNIGENDET_INLINE Range outputs_reading(int32_t j, int32_t size, int32_t source) {
  const float inverse = static_cast<float>(size) / static_cast<float>(source);
  const float slack = 1.0f + static_cast<float>(size) * 0x1p-21f;  // of the roundings in `tap` and here
  const float first = inverse * (static_cast<float>(j) - 0.5f) - 0.5f - slack;
  const float last = inverse * (static_cast<float>(j) + 1.5f) - 0.5f + slack;
  const bool reads_first = j == 0;            // positions below 0 are moved to 0
  const bool reads_last = j >= source - 1;    // positions beyond the last are moved there
  const float limit = static_cast<float>(size);
  Range range;
  range.begin = reads_first || first <= 0.0f ? 0 : static_cast<int32_t>(first < limit ? first : limit);
  range.end = reads_last || last + 1.0f >= limit ? size : static_cast<int32_t>(last + 1.0f);
  range.end = range.end < size ? range.end : size;
  range.begin = range.begin < range.end ? range.begin : range.end;
  return range;
}

// The part of the result that one row gives: u (1 - c), and the coefficients of
//   ds = across * r + own_student * s      dr = across * s + own_teacher * r
// without weight / normalizer.
struct Row {
  float distance, across, own_student, own_teacher;
};

// From s·s, r·r, s·r and the token's weight u.
UNIGENDET_INLINE Row finish_row(float ss, float rr, float sr, float u) {
  const float s_length = sqrtf(ss), r_length = sqrtf(rr);
  const float s_norm = s_length <= kEpsilon ? kEpsilon : s_length;  // so written, NaN stays NaN
  const float r_norm = r_length <= kEpsilon ? kEpsilon : r_length;
  const float cosine = sr / (s_norm * r_norm);
  Row row;
  row.distance = u * (1.0f - cosine);
  row.across = -u / (s_norm * r_norm);
  row.own_student = s_length <= kEpsilon ? 0.0f : u * cosine / (s_norm * s_norm);
  row.own_teacher = r_length <= kEpsilon ? 0.0f : u * cosine / (r_norm * r_norm);
  return row;
}

// weight / normalizer, with which the loss and, unless it is kept without, a gradient are multiplied.
UNIGENDET_INLINE float kappa_of(const AlignmentLossParams& p) {
  return p.weight / (p.normalizer == nullptr ? static_cast<float>(p.student_rows) : *p.normalizer);
}

}  // namespace
}  // namespace unigendet
