// What the host build's loops share: threads, the memory of large outputs, rows.
//
// All functions have internal linkage: they are compiled once per instruction set.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "alignment_loss.cuh"
#include "params.h"

namespace unigendet {
namespace {

constexpr int64_t kLargeOutput = 8 << 20;  // bytes from which on an output would only push others out of the caches
constexpr int64_t kHugeOutput = 64 << 20;  // and from which on it is worth 2 MB pages, which virtual machines may be slow to get

UNIGENDET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
UNIGENDET_INLINE const T* row_of(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

#if defined(__linux__)
constexpr uintptr_t kHugePage = 2 << 20;

struct Span {
  uintptr_t begin, end;
};

// The span of whole 2 MB pages inside a very large output; none in a smaller one.
UNIGENDET_INLINE Span huge_pages(void* memory, int64_t bytes) {
  if (memory == nullptr || bytes < kHugeOutput) return {0, 0};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  return {(begin + kHugePage - 1) / kHugePage * kHugePage, end / kHugePage * kHugePage};
}
#endif

// Fresh memory comes in 4 KB pages that cost a fault each. A very large output asks for 2 MB pages; that is advice only.
UNIGENDET_INLINE void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const Span pages = huge_pages(memory, bytes);
  if (pages.begin < pages.end) {
    (void)madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
  }
#else
  (void)memory, (void)bytes;
#endif
}

// Each thread fetches its share of the pages, which about holds the rows that it will write, in one call.
UNIGENDET_INLINE void populate(void* memory, int64_t bytes, int thread, int threads) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  const Span pages = huge_pages(memory, bytes);
  if (pages.begin >= pages.end) return;
  const uintptr_t count = (pages.end - pages.begin) / kHugePage;
  const uintptr_t first = count * static_cast<uintptr_t>(thread) / static_cast<uintptr_t>(threads);
  const uintptr_t last = count * static_cast<uintptr_t>(thread + 1) / static_cast<uintptr_t>(threads);
  if (first >= last) return;
  void* begin = reinterpret_cast<void*>(pages.begin + first * kHugePage);
  (void)madvise(begin, (last - first) * kHugePage, MADV_POPULATE_WRITE);
#else
  (void)memory, (void)bytes, (void)thread, (void)threads;
#endif
}

UNIGENDET_INLINE int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

UNIGENDET_INLINE int num_threads() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace unigendet
