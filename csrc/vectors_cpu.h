// Vectors of 16 floats, from and to memory of any dtype; the compiler cuts them into registers of the instruction set.
//
// All functions have internal linkage: they are compiled once per instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "alignment_loss.cuh"

namespace unigendet {
namespace {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

UNIGENDET_INLINE Words bits_of(Floats x) {
  Words bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

UNIGENDET_INLINE Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}

UNIGENDET_INLINE Floats load(const Bfloat16* p) {
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats x;
  memcpy(&x, &words, sizeof x);
  return x;
}

UNIGENDET_INLINE Floats load(const Float16* p) {
  Floats x;
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x = (Floats)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(0xffff), narrow);
#elif defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  memcpy(&x, &low, sizeof low);
  memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
#else
  // As to_float, on all lanes: a normal number moves in, a subnormal one is the difference of two normal ones.
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words);
  const Words sign = (words & 0x8000u) << 16, magnitude = (words & 0x7fffu) << 13;
  const Words special = (Words)(magnitude >= 0x0f800000u) & 0x38000000u;  // inf, NaN: the largest exponent
  const Words normal = magnitude + 0x38000000u + special;
  const Words shifted = magnitude + 0x38800000u;
  Floats subnormal, zero_point = Floats{} + 0x1p-14f;
  memcpy(&subnormal, &shifted, sizeof subnormal);
  subnormal -= zero_point;
  const Words is_subnormal = (Words)(magnitude < 0x00800000u);
  const Words result = sign | (is_subnormal & bits_of(subnormal)) | (~is_subnormal & normal);
  memcpy(&x, &result, sizeof x);
#endif
  return x;
}

UNIGENDET_INLINE void store(Floats x, float* p) { memcpy(p, &x, sizeof x); }

// x as numbers of the dtype of the pointer.
UNIGENDET_INLINE Halves narrow(Floats x, const Bfloat16*) {
  const Words bits = bits_of(x);
  const Words is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
  const Words rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return __builtin_convertvector(((is_nan & (bits | 0x400000u)) | (~is_nan & rounded)) >> 16, Halves);
}

UNIGENDET_INLINE void store(Floats x, Bfloat16* p) {
  const Halves halves = narrow(x, p);
  memcpy(p, &halves, sizeof halves);
}

UNIGENDET_INLINE Halves narrow(Floats x, const Float16*) {
  Halves halves;
#if defined(__AVX512F__)
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  halves = (Halves)_mm512_maskz_cvtps_ph(static_cast<__mmask16>(0xffff), (__m512)x, rounding);
#elif defined(__F16C__)
  __m256 low, high;
  memcpy(&low, &x, sizeof low);
  memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  const __m128i both[2] = {_mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                           _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  memcpy(&halves, both, sizeof halves);
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    Float16 narrow;
    from_float(x[lane], &narrow);
    halves[lane] = narrow.bits;
  }
#endif
  return halves;
}

UNIGENDET_INLINE void store(Floats x, Float16* p) {
  const Halves halves = narrow(x, p);
  memcpy(p, &halves, sizeof halves);
}

// The same, past the caches: a large output is not read soon, and its lines need not be fetched before they are written.
template <class T>
UNIGENDET_INLINE void store_past_caches(Floats x, T* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x, p));
  }
#elif defined(__AVX2__)
  __m256i parts[sizeof(T) / 2];
  store(x, reinterpret_cast<T*>(parts));
  for (size_t i = 0; i < sizeof(T) / 2; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + i, parts[i]);
#elif defined(__x86_64__)
  __m128i parts[sizeof(T)];
  store(x, reinterpret_cast<T*>(parts));
  for (size_t i = 0; i < sizeof(T); ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
#else
  store(x, p);
#endif
}

UNIGENDET_INLINE void finish_stores_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n numbers, zeros behind them.
template <class T>
UNIGENDET_INLINE Floats load_some(const T* p, int64_t n) {
  T padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

template <class T>
UNIGENDET_INLINE void store_some(Floats x, T* p, int64_t n) {
  T padded[kLanes];
  store(x, padded);
  memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

template <int64_t n>
struct Narrow {
  typedef float type __attribute__((vector_size(n * 4)));
};

// The sum of the first and the second half of p[0 .. 2 n).
template <int64_t n>
UNIGENDET_INLINE typename Narrow<n>::type halves(const float* p) {
  typename Narrow<n>::type low, high;
  memcpy(&low, p, sizeof low);
  memcpy(&high, p + n, sizeof high);
  return low + high;
}

// In one fixed order.
UNIGENDET_INLINE float sum(Floats x) {
  float parts[kLanes];
  memcpy(parts, &x, sizeof parts);
  const auto eight = halves<8>(parts);
  memcpy(parts, &eight, sizeof eight);
  const auto four = halves<4>(parts);
  memcpy(parts, &four, sizeof four);
  const auto two = halves<2>(parts);
  return two[0] + two[1];
}

UNIGENDET_INLINE float maximum(Floats x) {
  float parts[kLanes];
  memcpy(parts, &x, sizeof parts);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  }
  return parts[0];
}

// x as a number of T, as a float again.
template <class T>
UNIGENDET_INLINE Floats rounded(Floats x) {
  if constexpr (sizeof(T) == 4) return x;
  T narrow[kLanes];
  store(x, narrow);
  return load(narrow);
}

// All lanes of a vector, or the first n: what loops over columns do whole vectors and the last one with.
struct WholeVector {
  template <class T>
  inline __attribute__((always_inline)) Floats get(const T* p) const {
    return load(p);
  }
  template <class T>
  inline __attribute__((always_inline)) void put(Floats x, T* p) const {
    store(x, p);
  }
};
struct LastVector {
  int64_t n;
  template <class T>
  inline __attribute__((always_inline)) Floats get(const T* p) const {
    return load_some(p, n);
  }
  template <class T>
  inline __attribute__((always_inline)) void put(Floats x, T* p) const {
    store_some(x, p, n);
  }
};

// step(first column, lanes) for the vectors of n columns.
template <class Step>
UNIGENDET_INLINE void for_columns(int64_t n, Step step) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) step(d, WholeVector{});
  if (d < n) step(d, LastVector{n - d});
}

// Each lane, or the bound that it is beyond; NaN stays NaN, as the instructions return their second operand then.
UNIGENDET_INLINE Floats clamped(Floats x, float low, float high) {
#if defined(__AVX512F__)
  constexpr __mmask16 all = static_cast<__mmask16>(0xffff);
  x = (Floats)_mm512_maskz_max_ps(all, _mm512_set1_ps(low), (__m512)x);
  x = (Floats)_mm512_maskz_min_ps(all, _mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX__)
  __m256 parts[2];
  memcpy(parts, &x, sizeof parts);
  for (__m256& part : parts) part = _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), part));
  memcpy(&x, parts, sizeof parts);
#else
  const Words too_low = (Words)(x < low), too_high = (Words)(x > high);
  const Words bits = (~too_low & ~too_high & bits_of(x)) | (too_low & bits_of(Floats{} + low)) |
                     (too_high & bits_of(Floats{} + high));
  memcpy(&x, &bits, sizeof x);
#endif
  return x;
}

// e^x to a few units in the last place, from 0 to infinity; NaN stays NaN.
UNIGENDET_INLINE Floats exponential(Floats x) {
  // Beyond these bounds the result is 0 or infinite.
  x = clamped(x, -105.0f, 105.0f);
  // x = n ln 2 + r with an integer n: adding 1.5 * 2^23 leaves n in the lowest bits. ln 2 in two parts, of which the
  // first has so few bits that its product with n is exact.
  const Floats magic = Floats{} + 0x1.8p23f;
  const Floats shifted = x * 0x1.715476p+0f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
  // Taylor's polynomial of degree 7: |r| is at most ln 2 / 2, and what is left out below 2^-27.
  Floats y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps(static_cast<__mmask16>(0xffff), (__m512)y, (__m512)n);
#else
  // 2^n in two factors, since n may be beyond a float's exponents.
  const Words from_bottom = bits_of(shifted) - 0x4b400000u + 256u;
  const Words half = from_bottom >> 1, other = from_bottom - half;
  const Words bits[2] = {(half - 1u) << 23, (other - 1u) << 23};
  Floats factors[2];
  memcpy(factors, bits, sizeof factors);
  return y * factors[0] * factors[1];
#endif
}

}  // namespace
}  // namespace unigendet
