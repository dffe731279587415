// The alignment loss on the CPU. Compiled once per instruction set, each time with another UNIGENDET_ISA: so nothing here
// may have external linkage but the two entry points, and no template of the standard library is used.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "alignment_loss.cuh"
#include "cpu_kernels.h"
#include "threads_cpu.h"
#include "vectors_cpu.h"

namespace unigendet {
namespace {

constexpr int64_t kChunkTokens = 512;       // student rows that a thread takes at a time
constexpr int64_t kChunkTeacherRows = 64;
constexpr int64_t kChunkBytes = 1 << 18;    // of a gradient that is scaled

UNIGENDET_INLINE float weight_at(const AlignmentLossParams& p, int64_t row) {
  return p.token_weights == nullptr ? 1.0f : p.token_weights[row];
}

// The teacher's columns at one line of the student's grid, each interpolated between two teacher rows when it is asked
// for. Neighbouring tokens share columns, so the last even and the last odd one are kept.
template <class T>
struct Line {
  const T* lower;  // the first column of the two lines of the teacher's grid
  const T* upper;
  int64_t stride, columns;
  float fraction;
  float* kept[2];
  int32_t which[2];

  void move_to(const AlignmentLossParams& p, const Image& image, int32_t y) {
    const Tap t = tap(y, image.h, image.teacher_h);
    lower = row_of<T>(p.teacher, image.teacher_row + static_cast<int64_t>(t.lower) * image.teacher_w);
    upper = row_of<T>(p.teacher, image.teacher_row + static_cast<int64_t>(t.upper) * image.teacher_w);
    fraction = t.fraction;
    which[0] = which[1] = -1;
  }

  const float* column(int32_t x) {
    const T* from = lower + x * stride;
    if constexpr (sizeof(T) == 4) {
      if (fraction == 0.0f) return from;
    }
    float* out = kept[x & 1];
    if (which[x & 1] == x) return out;
    which[x & 1] = x;
    const T* from_upper = upper + x * stride;
    const float other = 1.0f - fraction;
    int64_t d = 0;
    if (fraction == 0.0f) {
      for (; d + kLanes <= columns; d += kLanes) store(load(from + d), out + d);
      if (d < columns) store(load_some(from + d, columns - d), out + d);
      return out;
    }
    for (; d + kLanes <= columns; d += kLanes) store(other * load(from + d) + fraction * load(from_upper + d), out + d);
    if (d < columns) {
      store(other * load_some(from + d, columns - d) + fraction * load_some(from_upper + d, columns - d), out + d);
    }
    return out;
  }
};

// r between two columns; if the fraction is 0, `right` is not read.
template <bool between>
struct Resized {
  const float* left;
  const float* right;
  float fraction;

  UNIGENDET_INLINE Floats mix(Floats a, Floats b, float fraction) { return (1.0f - fraction) * a + fraction * b; }
  Floats at(int64_t d) const {
    if constexpr (between) return mix(load(left + d), load(right + d), fraction);
    return load(left + d);
  }
  Floats some(int64_t d, int64_t n) const {
    if constexpr (between) return mix(load_some(left + d, n), load_some(right + d, n), fraction);
    return load_some(left + d, n);
  }
};

// One student row: its distance, its gradient if `ds` is not null, and its coefficients.
template <class S, bool between>
UNIGENDET_INLINE Row student_row(const S* s, Resized<between> r, S* ds, int64_t columns, float u, float factor,
                                 bool past_caches) {
  Floats ss = {}, rr = {}, sr = {};
  int64_t d = 0;
  for (; d + kLanes <= columns; d += kLanes) {
    const Floats x = load(s + d), y = r.at(d);
    ss += x * x;
    rr += y * y;
    sr += x * y;
  }
  if (d < columns) {
    const Floats x = load_some(s + d, columns - d), y = r.some(d, columns - d);
    ss += x * x;
    rr += y * y;
    sr += x * y;
  }
  const Row row = finish_row(sum(ss), sum(rr), sum(sr), u);
  if (ds == nullptr) return row;
  const float across = factor * row.across, own = factor * row.own_student;
  d = 0;
  if (past_caches) {
    for (; d + kLanes <= columns; d += kLanes) store_past_caches(across * r.at(d) + own * load(s + d), ds + d);
  } else {
    for (; d + kLanes <= columns; d += kLanes) store(across * r.at(d) + own * load(s + d), ds + d);
  }
  if (d < columns) {
    store_some(across * r.some(d, columns - d) + own * load_some(s + d, columns - d), ds + d, columns - d);
  }
  return row;
}

// The image that holds student row `row` (or teacher row, if `of_teacher`): the last that begins at it or before.
UNIGENDET_INLINE int32_t image_of(const AlignmentLossParams& p, int64_t row, bool of_teacher) {
  int32_t low = 0, high = p.num_images - 1;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    const int64_t start = of_teacher ? p.images[middle].teacher_row : p.images[middle].student_row;
    if (start <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Student rows [begin, end).
template <class S, class T>
static void student_rows(const AlignmentLossParams& p, float* scratch, int64_t begin, int64_t end) {
  const float factor = p.unit_dstudent ? 1.0f : kappa_of(p);
  const int64_t row_bytes = p.columns * static_cast<int64_t>(sizeof(S));
  const bool aligned = reinterpret_cast<uintptr_t>(p.dstudent) % 64 == 0 && row_bytes % 64 == 0;
  const bool past_caches = aligned && p.student_rows * row_bytes >= kLargeOutput;
  Line<T> line;
  line.stride = p.teacher.stride;
  line.columns = p.columns;
  line.kept[0] = scratch;
  line.kept[1] = scratch + scratch_floats(p.columns) / 2;
  int64_t row = begin;
  for (int32_t i = image_of(p, begin, false); row < end; ++i) {
    const Image& image = p.images[i];
    const int64_t image_end = smaller(end, image.student_row + static_cast<int64_t>(image.h) * image.w);
    while (row < image_end) {
      const int64_t token = row - image.student_row;
      const int32_t y = static_cast<int32_t>(token / image.w);
      line.move_to(p, image, y);
      const int64_t line_end = smaller(image_end, image.student_row + static_cast<int64_t>(y + 1) * image.w);
      for (int32_t x = static_cast<int32_t>(token % image.w); row < line_end; ++row, ++x) {
        const Tap t = tap(x, image.w, image.teacher_w);
        const S* s = row_of<S>(p.student, row);
        S* ds = p.dstudent == nullptr ? nullptr : static_cast<S*>(p.dstudent) + row * p.columns;
        const float u = weight_at(p, row);
        const float* left = line.column(t.lower);
        Row result;
        if (t.fraction == 0.0f) {
          result = student_row<S>(s, Resized<false>{left, left, 0.0f}, ds, p.columns, u, factor, past_caches);
        } else {
          const Resized<true> r = {left, line.column(t.upper), t.fraction};
          result = student_row<S>(s, r, ds, p.columns, u, factor, past_caches);
        }
        p.distances[row] = result.distance;
        if (p.coefficients != nullptr) {
          p.coefficients[2 * row] = result.across;
          p.coefficients[2 * row + 1] = result.own_teacher;
        }
      }
    }
  }
  finish_stores_past_caches();
}

// The four taps of one student token, without those of weight 0.
template <class T>
struct Taps {
  const T* rows[4];
  float weights[4];
  int32_t count;

  void add(const T* row, float weight) {
    if (weight == 0.0f) return;
    rows[count] = row;
    weights[count++] = weight;
  }

  Taps(const Rows& teacher, const Image& image, Tap y, Tap x) : rows(), weights(), count(0) {
    const T* upper_left = row_of<T>(teacher, image.teacher_row + static_cast<int64_t>(y.lower) * image.teacher_w);
    const T* lower_left = row_of<T>(teacher, image.teacher_row + static_cast<int64_t>(y.upper) * image.teacher_w);
    add(upper_left + x.lower * teacher.stride, (1.0f - y.fraction) * (1.0f - x.fraction));
    add(upper_left + x.upper * teacher.stride, (1.0f - y.fraction) * x.fraction);
    add(lower_left + x.lower * teacher.stride, y.fraction * (1.0f - x.fraction));
    add(lower_left + x.upper * teacher.stride, y.fraction * x.fraction);
  }

  Floats at(int64_t d) const {
    Floats r = weights[0] * load(rows[0] + d);
    for (int32_t i = 1; i < count; ++i) r += weights[i] * load(rows[i] + d);
    return r;
  }
  Floats some(int64_t d, int64_t n) const {
    Floats r = weights[0] * load_some(rows[0] + d, n);
    for (int32_t i = 1; i < count; ++i) r += weights[i] * load_some(rows[i] + d, n);
    return r;
  }
};

// sum += across * s + own * r
template <class S, class T>
static void add_token(float* sum, const S* s, const Taps<T>& r, int64_t columns, float across, float own) {
  int64_t d = 0;
  for (; d + kLanes <= columns; d += kLanes) store(load(sum + d) + (across * load(s + d) + own * r.at(d)), sum + d);
  if (d < columns) {
    const Floats last = across * load_some(s + d, columns - d) + own * r.some(d, columns - d);
    store(load(sum + d) + last, sum + d);
  }
}

// Gradients of teacher rows [begin, end): each one the sum over the student tokens that read it, in their order.
template <class S, class T>
static void teacher_rows(const AlignmentLossParams& p, float* sum, int64_t begin, int64_t end) {
  const float factor = p.unit_dteacher ? 1.0f : kappa_of(p);
  const int64_t columns = p.columns;
  int32_t i = image_of(p, begin, true);
  for (int64_t row = begin; row < end; ++row) {
    while (i + 1 < p.num_images && p.images[i + 1].teacher_row <= row) ++i;
    const Image& image = p.images[i];
    const int32_t teacher_y = static_cast<int32_t>((row - image.teacher_row) / image.teacher_w);
    const int32_t teacher_x = static_cast<int32_t>((row - image.teacher_row) % image.teacher_w);
    const Range ys = outputs_reading(teacher_y, image.h, image.teacher_h);
    const Range xs = outputs_reading(teacher_x, image.w, image.teacher_w);
    memset(sum, 0, static_cast<size_t>(scratch_floats(columns) / 2) * sizeof(float));
    for (int32_t y = ys.begin; y < ys.end; ++y) {
      const Tap y_tap = tap(y, image.h, image.teacher_h);
      const float y_weight = weight_of(y_tap, teacher_y);
      if (y_weight == 0.0f) continue;
      for (int32_t x = xs.begin; x < xs.end; ++x) {
        const Tap x_tap = tap(x, image.w, image.teacher_w);
        const float weight = y_weight * weight_of(x_tap, teacher_x);
        if (weight == 0.0f) continue;
        const int64_t token = image.student_row + static_cast<int64_t>(y) * image.w + x;
        const float* own = p.coefficients + 2 * token;
        const Taps<T> r(p.teacher, image, y_tap, x_tap);
        add_token(sum, row_of<S>(p.student, token), r, columns, weight * own[0], weight * own[1]);
      }
    }
    T* out = static_cast<T*>(p.dteacher) + row * columns;
    int64_t d = 0;
    for (; d + kLanes <= columns; d += kLanes) store(factor * load(sum + d), out + d);
    if (d < columns) store_some(factor * load(sum + d), out + d, columns - d);
  }
}

// The sums over images and over all, from the rows' values: one thread, one order.
void reduce(const AlignmentLossParams& p) {
  double total = 0.0;
  for (int32_t i = 0; i < p.num_images; ++i) {
    const Image& image = p.images[i];
    const int64_t tokens = static_cast<int64_t>(image.h) * image.w;
    double distance = 0.0, count = p.token_weights == nullptr ? static_cast<double>(tokens) : 0.0;
    for (int64_t token = 0; token < tokens; ++token) {
      distance += static_cast<double>(p.distances[image.student_row + token]);
      if (p.token_weights != nullptr) count += static_cast<double>(p.token_weights[image.student_row + token]);
    }
    p.means[i] = static_cast<float>(distance / count);
    total += distance;
  }
  *p.loss = kappa_of(p) * static_cast<float>(total);
}

template <class S, class T>
static void run(const AlignmentLossParams& p) {
  const int64_t columns = p.columns;
  const int64_t student_bytes = p.student_rows * columns * static_cast<int64_t>(sizeof(S));
  const int64_t teacher_bytes = p.teacher_rows * columns * static_cast<int64_t>(sizeof(T));
  advise_huge_pages(p.dstudent, student_bytes);
  advise_huge_pages(p.dteacher, teacher_bytes);
#pragma omp parallel num_threads(p.num_threads)
  {
    const int thread = this_thread(), threads = num_threads();
    float* scratch = p.scratch + thread * scratch_floats(columns);
    populate(p.dstudent, student_bytes, thread, threads);
    populate(p.dteacher, teacher_bytes, thread, threads);
    const int64_t tokens = smaller(kChunkTokens, (int64_t{p.student_rows} + threads - 1) / threads);
    const int64_t student_chunks = (p.student_rows + tokens - 1) / tokens;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < student_chunks; ++i) {
      student_rows<S, T>(p, scratch, i * tokens, smaller((i + 1) * tokens, p.student_rows));
    }
    if (p.dteacher != nullptr) {
      const int64_t rows = smaller(kChunkTeacherRows, (int64_t{p.teacher_rows} + threads - 1) / threads);
      const int64_t teacher_chunks = (p.teacher_rows + rows - 1) / rows;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < teacher_chunks; ++i) {
        teacher_rows<S, T>(p, scratch, i * rows, smaller((i + 1) * rows, p.teacher_rows));
      }
    }
  }
  reduce(p);
}

template <class S>
static void run(const AlignmentLossParams& p) {
  switch (p.teacher.dtype) {
    case Dtype::float32: return run<S, float>(p);
    case Dtype::bfloat16: return run<S, Bfloat16>(p);
    case Dtype::float16: return run<S, Float16>(p);
  }
}

template <class T>
static void scale_all(const ScaleParams& p) {
  const float factor = *p.factor;
  if (factor == 1.0f && p.out == p.gradient) return;
  const T* gradient = static_cast<const T*>(p.gradient);
  T* out = static_cast<T*>(p.out);
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(T));
  if (p.out != p.gradient) advise_huge_pages(p.out, p.numel * static_cast<int64_t>(sizeof(T)));
  const int64_t chunks = (p.numel + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t end = smaller((chunk + 1) * kChunk, p.numel);
    int64_t i = chunk * kChunk;
    for (; i + kLanes <= end; i += kLanes) store(factor * load(gradient + i), out + i);
    if (i < end) store_some(factor * load_some(gradient + i, end - i), out + i, end - i);
  }
}

}  // namespace

namespace UNIGENDET_ISA {

void alignment_loss(const AlignmentLossParams& p) {
  switch (p.student.dtype) {
    case Dtype::float32: return run<float>(p);
    case Dtype::bfloat16: return run<Bfloat16>(p);
    case Dtype::float16: return run<Float16>(p);
  }
}

void scale(const ScaleParams& p) {
  switch (p.dtype) {
    case Dtype::float32: return scale_all<float>(p);
    case Dtype::bfloat16: return scale_all<Bfloat16>(p);
    case Dtype::float16: return scale_all<Float16>(p);
  }
}

}  // namespace UNIGENDET_ISA
}  // namespace unigendet
