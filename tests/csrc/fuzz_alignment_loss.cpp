// The host build of the alignment loss against a naive version in double precision, on random sizes, strides, dtypes,
// threads and options, for every instruction set that this processor has. Built with sanitizers by `make sanitize`. Runs all
// cases and says how many failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/alignment_loss.cuh"
#include "../../csrc/cpu_kernels.h"
#include "fuzz.h"

using namespace unigendet;

namespace {

constexpr int64_t kLargeOutput = 8 << 20;  // as in threads_cpu.h: what is written past the caches
constexpr double kRounding = 1e-5;         // of a few hundred float operations, relative to the size of their terms

struct Case {
  std::mt19937 random;
  std::vector<Image> images;
  int32_t student_rows = 0, teacher_rows = 0, columns = 0;
  std::vector<float> token_weights;
  float normalizer = 0.0f, weight = 0.0f;
  bool units[2] = {}, needs[2] = {};
  int64_t shift = 0;
  Matrix student, teacher;

  int32_t integer(int32_t low, int32_t high) { return low + static_cast<int32_t>(random() % unsigned(high - low + 1)); }

  void add(Image image) {
    image.student_row = student_rows;
    image.teacher_row = teacher_rows;
    student_rows += image.h * image.w;
    teacher_rows += image.teacher_h * image.teacher_w;
    images.push_back(image);
  }

  // Everything at random, of small size.
  explicit Case(unsigned seed) : random(seed) {
    const int32_t count = integer(1, 4);
    for (int32_t i = 0; i < count; ++i) {
      Image image{};
      for (int32_t* side : {&image.h, &image.w, &image.teacher_h, &image.teacher_w}) *side = integer(1, 9);
      if (integer(0, 3) == 0) image.teacher_h = image.h, image.teacher_w = image.w;
      if (integer(0, 7) == 0) image.teacher_h = image.teacher_w = 1;
      add(image);
    }
    columns = 16 * integer(1, 8);
    if (integer(0, 2) != 0) columns = integer(1, 70);
    shift = integer(0, 3);
    for (Matrix* matrix : {&student, &teacher}) {
      const Dtype dtype = kDtypes[integer(0, 2)];
      const int64_t stride = columns + integer(0, 5);
      *matrix = Matrix(matrix == &student ? student_rows : teacher_rows, columns, stride, dtype, shift);
    }
    fill();
    for (bool& needed : needs) needed = integer(0, 3) != 0;
  }

  // A student's gradient that is written past the caches, of the given dtype.
  Case(unsigned seed, Dtype dtype, bool needs_teacher) : random(seed), columns(static_cast<int32_t>(4096 / size_of(dtype))) {
    add({33, 40, 20, 25, 0, 0});
    add({28, 29, 28, 29, 0, 0});
    student = Matrix(student_rows, columns, columns, dtype, 0);
    teacher = Matrix(teacher_rows, columns, columns + 3, kDtypes[(static_cast<int>(dtype) + 1) % 3], 0);
    fill();
    needs[0] = true, needs[1] = needs_teacher;
  }

  void fill() {
    std::normal_distribution<float> normal;
    for (Matrix* matrix : {&student, &teacher}) {
      for (int64_t row = 0; row < matrix->rows; ++row) {
        const float scale = integer(0, 19) == 0 ? 0.0f : 1.0f;
        for (int64_t d = 0; d < columns; ++d) write(scale * normal(random), matrix->at(row, d), matrix->dtype);
      }
    }
    if (integer(0, 1)) {
      for (int32_t i = 0; i < student_rows; ++i) token_weights.push_back(integer(0, 4) == 0 ? 0.0f : normal(random));
    }
    if (integer(0, 1)) normalizer = static_cast<float>(integer(1, 100));
    weight = normal(random);
    for (bool& unit : units) unit = integer(0, 1) != 0;
  }
};

struct Result {
  float loss = kNaN;
  std::vector<float> means;
  Matrix dstudent, dteacher;

  explicit Result(const Case& c)
      : means(c.images.size(), kNaN), dstudent(c.student_rows, c.columns, c.columns, c.student.dtype, c.shift),
        dteacher(c.teacher_rows, c.columns, c.columns, c.teacher.dtype, c.shift) {}

  bool operator==(const Result& other) const {
    return memcmp(&loss, &other.loss, sizeof loss) == 0 && dstudent == other.dstudent && dteacher == other.dteacher &&
           memcmp(means.data(), other.means.data(), means.size() * sizeof(float)) == 0;
  }
};

Result compute(const Case& c, const CpuKernels& kernels, int32_t num_threads) {
  Result result(c);
  std::vector<float> distances(static_cast<size_t>(c.student_rows), kNaN);
  std::vector<float> coefficients(2 * distances.size(), kNaN);
  const size_t floats = static_cast<size_t>(num_threads * scratch_floats(c.columns));
  const std::unique_ptr<float, void (*)(void*)> scratch(
      static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), std::free);
  AlignmentLossParams p{};
  p.student = c.student.view();
  p.teacher = c.teacher.view();
  p.student_rows = c.student_rows;
  p.teacher_rows = c.teacher_rows;
  p.columns = c.columns;
  p.images = c.images.data();
  p.num_images = static_cast<int32_t>(c.images.size());
  p.normalizer = c.normalizer > 0.0f ? &c.normalizer : nullptr;
  p.token_weights = c.token_weights.empty() ? nullptr : c.token_weights.data();
  p.weight = c.weight;
  p.unit_dstudent = c.units[0];
  p.unit_dteacher = c.units[1];
  p.loss = &result.loss;
  p.means = result.means.data();
  p.dstudent = c.needs[0] ? result.dstudent.data : nullptr;
  p.dteacher = c.needs[1] ? result.dteacher.data : nullptr;
  p.distances = distances.data();
  p.coefficients = c.needs[1] ? coefficients.data() : nullptr;
  p.scratch = scratch.get();
  p.num_threads = num_threads;
  kernels.alignment_loss(p);
  return result;
}

bool close(const char* what, double have, double want, double tolerance) {
  if (std::fabs(have - want) <= tolerance) return true;
  std::printf("%s is %.9g; it must be %.9g (+- %.3g)\n", what, have, want, tolerance);
  return false;
}

// The sample position as the kernels round it, since a row that is almost zero may have any direction.
Tap position_of(int32_t i, int32_t size, int32_t source) {
  const Tap t = tap(i, size, source);
  const double exact = std::fmin(std::fmax(0.0, (i + 0.5) * source / size - 0.5), source - 1.0);
  if (std::fabs(t.lower + double(t.fraction) - exact) > 1e-6 * source || t.upper >= source || t.fraction > 1.0f) {
    std::printf("position %d of %d over %d is wrong\n", i, size, source);
    std::exit(1);
  }
  return t;
}

// A gradient and, of each of its rows, the size of the terms that are added there.
struct ExactGradient {
  std::vector<double> values, sizes;
};

struct Exact {
  double loss = 0.0, loss_size = 0.0;
  std::vector<double> means, mean_sizes;
  ExactGradient dstudent, dteacher;
};

struct Source {
  int64_t row;
  double weight;
};

// One token. Float sums are off by roundings of their terms: r by those of the teacher's rows, which may cancel in it, so
// the relative error of r, and with it that of its direction, is larger by 1 + |rows| / |r|. ds is of size |u| / |s|, dr
// of |u| / |r|.
struct Token {
  double distance, size, ds_size, dr_size;
};

Token add_token(const double* s, const std::vector<double>& teacher, const Source (&sources)[4], size_t columns, double u,
                double* ds, std::vector<double>* dteacher, const double (&factors)[2]) {
  std::vector<double> r(columns);
  double ss = 0.0, rr = 0.0, sr = 0.0, absolute = 0.0;
  for (size_t d = 0; d < columns; ++d) {
    double terms = 0.0;
    for (const Source& source : sources) {
      const double term = source.weight * teacher[size_t(source.row) * columns + d];
      r[d] += term, terms += std::fabs(term);
    }
    ss += s[d] * s[d], rr += r[d] * r[d], sr += s[d] * r[d], absolute += terms * terms;
  }
  const double s_norm = std::fmax(std::sqrt(ss), 1e-8), r_norm = std::fmax(std::sqrt(rr), 1e-8);
  const double cosine = sr / (s_norm * r_norm), across = -u / (s_norm * r_norm);
  const double own_student = ss > 1e-16 ? u * cosine / (s_norm * s_norm) : 0.0;
  const double own_teacher = rr > 1e-16 ? u * cosine / (r_norm * r_norm) : 0.0;
  for (size_t d = 0; d < columns; ++d) {
    ds[d] = factors[0] * (across * r[d] + own_student * s[d]);
    const double dr = factors[1] * (across * s[d] + own_teacher * r[d]);
    for (const Source& source : sources) (*dteacher)[size_t(source.row) * columns + d] += source.weight * dr;
  }
  const double size = std::fabs(u) * (1.0 + std::sqrt(absolute) / r_norm);
  return {u * (1.0 - cosine), size, std::fabs(factors[0]) * size / s_norm, std::fabs(factors[1]) * size / r_norm};
}

Exact exact_of(const Case& c) {
  const size_t columns = size_t(c.columns);
  const double kappa = c.weight / (c.normalizer > 0.0f ? double(c.normalizer) : double(c.student_rows));
  const double factors[2] = {c.units[0] ? 1.0 : kappa, c.units[1] ? 1.0 : kappa};
  const std::vector<double> student = c.student.values(), teacher = c.teacher.values();
  Exact exact;
  exact.dstudent = {std::vector<double>(student.size()), std::vector<double>(size_t(c.student_rows))};
  exact.dteacher = {std::vector<double>(teacher.size()), std::vector<double>(size_t(c.teacher_rows))};
  for (const Image& image : c.images) {
    double distance = 0.0, count = 0.0, size = 0.0;
    for (int32_t i = 0; i < image.h * image.w; ++i) {
      const size_t row = size_t(image.student_row + i);
      const double u = c.token_weights.empty() ? 1.0 : double(c.token_weights[row]);
      const Tap y = position_of(i / image.w, image.h, image.teacher_h);
      const Tap x = position_of(i % image.w, image.w, image.teacher_w);
      Source sources[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t line = k < 2 ? y.lower : y.upper, column = k % 2 == 0 ? x.lower : x.upper;
        const double fy = y.fraction, fx = x.fraction;
        sources[k] = {image.teacher_row + line * image.teacher_w + column,
                      (k < 2 ? 1.0 - fy : fy) * (k % 2 == 0 ? 1.0 - fx : fx)};
      }
      const Token token = add_token(&student[row * columns], teacher, sources, columns, u,
                                    &exact.dstudent.values[row * columns], &exact.dteacher.values, factors);
      distance += token.distance, count += u, size += token.size;
      exact.dstudent.sizes[row] = token.ds_size;
      for (const Source& s : sources) exact.dteacher.sizes[size_t(s.row)] += s.weight * token.dr_size;
    }
    exact.loss += kappa * distance, exact.loss_size += std::fabs(kappa) * size;
    exact.means.push_back(distance / count), exact.mean_sizes.push_back(size / std::fabs(count));
  }
  return exact;
}

// Each number must lie between the roundings of the least and the greatest value that arithmetic in float may give: so
// what overflows in float16 is infinite, and a small row is not hidden by a large one.
bool check_gradient(const char* name, const Matrix& have, const ExactGradient& want) {
  for (int64_t row = 0; row < have.rows; ++row) {
    const double tolerance = kRounding * want.sizes[size_t(row)];
    for (int64_t d = 0; d < have.columns; ++d) {
      const double value = have.value(row, d), exact = want.values[size_t(row * have.columns + d)];
      if (value >= rounded(exact - tolerance, have.dtype) && value <= rounded(exact + tolerance, have.dtype)) continue;
      std::printf("%s[%lld, %lld] is %.9g; it must be %.9g (+- %.3g before it is rounded)\n", name, (long long)row,
                  (long long)d, value, exact, tolerance);
      return false;
    }
  }
  return true;
}

bool check(const Case& c, const Exact& exact, const Result& have) {
  bool good = close("loss", double(have.loss), exact.loss, kRounding * exact.loss_size);
  for (size_t i = 0; i < c.images.size(); ++i) {
    if (std::isnan(exact.means[i]) && std::isnan(have.means[i])) continue;  // all weights are zero
    good &= close("mean", double(have.means[i]), exact.means[i], kRounding * exact.mean_sizes[i]);
  }
  if (c.needs[0]) good &= check_gradient("dstudent", have.dstudent, exact.dstudent);
  if (c.needs[1]) good &= check_gradient("dteacher", have.dteacher, exact.dteacher);
  return good;
}

// Whether the student's gradient is written past the caches and on large pages.
bool is_large(const Result& result) {
  const Matrix& gradient = result.dstudent;
  return reinterpret_cast<uintptr_t>(gradient.data) % 64 == 0 && gradient.stride * size_of(gradient.dtype) % 64 == 0 &&
         gradient.bytes > kLargeOutput;
}

bool check_scale(Case& c, const CpuKernels& kernels) {
  const int64_t columns = c.integer(1, 100);
  const Dtype dtype = kDtypes[c.integer(0, 2)];
  const Matrix from(1, columns, columns, dtype, c.shift), to(1, columns, columns, dtype, c.shift);
  for (int64_t d = 0; d < columns; ++d) write(float(c.integer(-99, 99)) / 16.0f, from.at(0, d), dtype);
  const float factor = float(c.integer(-2, 2));
  kernels.scale({from.data, to.data, &factor, columns, dtype, 2, nullptr});
  bool good = true;
  for (int64_t d = 0; d < columns; ++d) good &= close("scaled", to.value(0, d), double(factor) * from.value(0, d), 0.0);
  return good;
}

// Positions on sides as long as there may be, where floats no longer tell neighbours apart: they stay inside, and each
// output is among those that are searched for its sources' gradients.
bool check_long_sides() {
  std::mt19937 random(0);
  const auto integer = [&random](int32_t most) { return static_cast<int32_t>(1 + random() % unsigned(most)); };
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kMostOutputs = 1 << 25;
  std::vector<int32_t> sources = {1, 2, 3, (1 << 24) + 1, (1 << 30) + 1, kMost - 127, kMost - 64, kMost - 1, kMost};
  std::vector<int32_t> sizes = {1, 2, 3, (1 << 24) - 1, (1 << 24) + 1, kMostOutputs - 1, kMostOutputs};
  for (int bits = 1; bits <= 31; ++bits) sources.push_back(integer(static_cast<int32_t>((1u << bits) - 1)));
  for (int bits = 1; bits <= 25; ++bits) sizes.push_back(integer(1 << bits));
  for (const int32_t source : sources) {
    for (const int32_t size : sizes) {
      std::vector<int32_t> outputs = {0, size / 2, size - 1, std::max(size - 2, 0), std::max(size - 3, 0)};
      for (int k = 0; k < 20; ++k) outputs.push_back(integer(size) - 1);
      for (const int32_t i : outputs) {
        const Tap t = tap(i, size, source);
        bool good = t.lower >= 0 && t.upper <= source - 1 && t.upper >= t.lower && t.upper <= int64_t(t.lower) + 1 &&
                    t.fraction >= 0.0f && t.fraction <= 1.0f;
        for (const int32_t j : {t.lower, t.upper}) {
          if (!good || weight_of(t, j) == 0.0f) continue;
          const Range range = outputs_reading(j, size, source);
          good = range.begin <= i && i < range.end;
        }
        if (good) continue;
        std::printf("position %d of %d over %d is wrong: %d, %d\n", i, size, source, t.lower, t.upper);
        return false;
      }
    }
  }
  return true;
}

// Every float16 and every rounding boundary there is: what is converted there and back must be what it was.
bool check_conversions() {
  bool good = true;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Float16 half = {static_cast<uint16_t>(bits)};
    const Bfloat16 brain = {static_cast<uint16_t>(bits)};
    Float16 half_again;
    Bfloat16 brain_again;
    from_float(to_float(half), &half_again);
    from_float(to_float(brain), &brain_again);
    const bool half_nan = (bits & 0x7fffu) > 0x7c00u, brain_nan = (bits & 0x7fffu) > 0x7f80u;
    good &= half_nan ? (half_again.bits & 0x7fffu) > 0x7c00u : half_again.bits == half.bits;
    good &= brain_nan ? (brain_again.bits & 0x7fffu) > 0x7f80u : brain_again.bits == brain.bits;
    if ((bits & 0x7fffu) >= 0x7bffu) continue;
    const Float16 next = {static_cast<uint16_t>(bits + 1)};  // halfway to it: the even one of the two
    from_float((to_float(half) + to_float(next)) * 0.5f, &half_again);
    good &= half_again.bits == (bits % 2 == 0 ? half.bits : next.bits);
  }
  if (!good) std::printf("a conversion is wrong\n");
  return good;
}

// One case on every instruction set; returns on how many it fails.
int failures_of(Case& c, unsigned seed, bool large) {
  const Exact exact = exact_of(c);
  int failures = 0;
  for (const CpuKernels& kernels : kCpuKernels) {
    if (!kernels.supported()) continue;
    const Result one = compute(c, kernels, 1);
    bool good = check(c, exact, one);
    if (!(compute(c, kernels, 1 + c.integer(1, 3)) == one)) {
      std::printf("results depend on the number of threads\n");
      good = false;
    }
    if (large && !is_large(one)) {
      std::printf("the large case is not large\n");
      good = false;
    }
    good &= check_scale(c, kernels);
    if (good) continue;
    std::printf("%s, %sseed %u\n", kernels.isa, large ? "large, " : "", seed);
    ++failures;
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  int failures = !check_conversions() + !check_long_sides();
  for (unsigned seed = 0; seed < cases; ++seed) {
    Case c(seed);
    failures += failures_of(c, seed, false);
  }
  for (const Dtype dtype : kDtypes) {
    Case c(cases, dtype, dtype == Dtype::bfloat16);
    failures += failures_of(c, cases, true);
  }
  if (failures == 0) {
    std::printf("ok\n");
    return 0;
  }
  std::printf("FAILED: %d\n", failures);
  return 1;
}
