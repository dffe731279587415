// Some numbers of one thread, loaded and stored 16 bytes at a time.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace unigendet {
namespace {

template <class T, int n>
struct alignas(sizeof(T) * n <= 16 ? sizeof(T) * n : 16) Pack {
  T values[n];
};

// The 16-byte words of a pack; narrower packs are single numbers.
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load(const T* p) {
  Pack<T, n> pack;
  if constexpr (n == 1) {
    pack.values[0] = *p;
  } else {
    const uint4* words = reinterpret_cast<const uint4*>(p);
    uint4* to = reinterpret_cast<uint4*>(&pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(uint4)); ++i) to[i] = __ldg(words + i);
  }
  return pack;
}

// As load, for what is read once: it must not push the teacher's rows out of the caches.
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load_once(const T* p) {
  Pack<T, n> pack;
  if constexpr (n == 1) {
    pack.values[0] = *p;
  } else {
    const uint4* words = reinterpret_cast<const uint4*>(p);
    uint4* to = reinterpret_cast<uint4*>(&pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(uint4)); ++i) to[i] = __ldcs(words + i);
  }
  return pack;
}

template <class T, int n>
__device__ __forceinline__ void store_once(T* p, const Pack<T, n>& pack) {
  if constexpr (n == 1) {
    *p = pack.values[0];
  } else {
    const uint4* from = reinterpret_cast<const uint4*>(&pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(uint4)); ++i) {
      __stcs(reinterpret_cast<uint4*>(p) + i, from[i]);
    }
  }
}

// Makes the compiler forget what it has computed from the pack: the numbers stay in registers as they were read, not as
// floats, which would need twice as many.
template <class T, int n>
__device__ __forceinline__ void stay_packed(Pack<T, n>& pack) {
  if constexpr (sizeof(T) * n >= 4 && sizeof(T) < 4) {
    uint32_t* words = reinterpret_cast<uint32_t*>(&pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / 4); ++i) asm volatile("" : "+r"(words[i]));
  }
}

}  // namespace
}  // namespace unigendet
