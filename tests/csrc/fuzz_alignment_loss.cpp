// The host build of the alignment loss against a naive version in double precision, on random sizes, strides, dtypes,
// threads and options, for every instruction set that this processor has. Built with sanitizers by `make sanitize`. Every
// buffer ends where its last number does, and gaps between rows are NaN, so a stray access is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/alignment_loss.cuh"
#include "../../csrc/alignment_loss_cpu.h"

using namespace unigendet;

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

double epsilon_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 0x1p-23 : dtype == Dtype::bfloat16 ? 0x1p-7 : 0x1p-10;
}

double read(const char* p, Dtype dtype) {
  if (dtype == Dtype::float32) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
  }
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return dtype == Dtype::bfloat16 ? to_float(Bfloat16{bits}) : to_float(Float16{bits});
}

void write(float value, char* p, Dtype dtype) {
  if (dtype == Dtype::float32) {
    memcpy(p, &value, sizeof value);
  } else if (dtype == Dtype::bfloat16) {
    Bfloat16 narrow;
    from_float(value, &narrow);
    memcpy(p, &narrow, sizeof narrow);
  } else {
    Float16 narrow;
    from_float(value, &narrow);
    memcpy(p, &narrow, sizeof narrow);
  }
}

// A matrix in memory of exactly its extent, filled with NaN.
struct Matrix {
  int64_t rows, columns, stride;
  Dtype dtype;
  std::vector<char> memory;

  Matrix(int64_t rows_, int64_t columns_, int64_t stride_, Dtype dtype_)
      : rows(rows_), columns(columns_), stride(stride_), dtype(dtype_),
        memory(static_cast<size_t>(((rows - 1) * stride + columns) * size_of(dtype))) {
    for (size_t i = 0; i < memory.size(); i += static_cast<size_t>(size_of(dtype))) write(kNaN, &memory[i], dtype);
  }
  char* at(int64_t row, int64_t column) {
    return memory.data() + (row * stride + column) * size_of(dtype);
  }
  double value(int64_t row, int64_t column) { return read(at(row, column), dtype); }
  Rows view() { return {memory.data(), stride, dtype}; }
};

struct Case {
  std::mt19937 random;
  std::vector<Image> images;
  int32_t student_rows = 0, teacher_rows = 0, columns;
  std::vector<float> token_weights;
  float normalizer = 0.0f, weight;
  bool units[2], needs[2];
  Matrix student, teacher;

  int32_t integer(int32_t low, int32_t high) { return low + static_cast<int32_t>(random() % unsigned(high - low + 1)); }

  // Sizes come first: the matrices need them.
  int32_t choose_images(bool large) {
    const int32_t count = large ? 2 : integer(1, 4);
    for (int32_t i = 0; i < count; ++i) {
      Image image = {integer(1, 9), integer(1, 9), integer(1, 9), integer(1, 9), student_rows, teacher_rows};
      if (large) image = {33, 40, 20, 25, student_rows, teacher_rows};
      if (integer(0, 3) == 0) image.teacher_h = image.h, image.teacher_w = image.w;
      if (!large && integer(0, 7) == 0) image.teacher_h = image.teacher_w = 1;
      student_rows += image.h * image.w;
      teacher_rows += image.teacher_h * image.teacher_w;
      images.push_back(image);
    }
    if (large) return 1024 * (4 / static_cast<int32_t>(size_of(Dtype::float32)));
    return integer(0, 2) == 0 ? 16 * integer(1, 8) : integer(1, 70);
  }

  explicit Case(unsigned seed, bool large)
      : random(seed), columns(choose_images(large)),
        student(student_rows, columns, columns + (large ? 0 : integer(0, 5)), kDtypes[random() % 3]),
        teacher(teacher_rows, columns, columns + integer(0, 5), kDtypes[random() % 3]) {
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
    for (int i = 0; i < 2; ++i) units[i] = integer(0, 1) != 0, needs[i] = large ? i == 0 : integer(0, 3) != 0;
  }
};

struct Result {
  float loss = kNaN;
  std::vector<float> means;
  Matrix dstudent, dteacher;

  explicit Result(const Case& c)
      : means(c.images.size(), kNaN), dstudent(c.student_rows, c.columns, c.columns, c.student.dtype),
        dteacher(c.teacher_rows, c.columns, c.columns, c.teacher.dtype) {}

  bool operator==(const Result& other) const {
    return memcmp(&loss, &other.loss, sizeof loss) == 0 && dstudent.memory == other.dstudent.memory &&
           dteacher.memory == other.dteacher.memory &&
           memcmp(means.data(), other.means.data(), means.size() * sizeof(float)) == 0;
  }
};

Result compute(Case& c, const CpuKernels& kernels, int32_t num_threads) {
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
  p.dstudent = c.needs[0] ? result.dstudent.memory.data() : nullptr;
  p.dteacher = c.needs[1] ? result.dteacher.memory.data() : nullptr;
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

// Float sums of n numbers of size 1 are off by a few n * 2^-24; positions by as much. Gradients are of size u / |s|.
bool check(Case& c, const Result& have) {
  const double kappa = c.weight / (c.normalizer > 0.0f ? double(c.normalizer) : double(c.student_rows));
  std::vector<double> dteacher(static_cast<size_t>(c.teacher_rows) * size_t(c.columns));
  std::vector<double> r(static_cast<size_t>(c.columns));
  double total = 0.0, total_size = 0.0, largest[2] = {0.0, 0.0};
  std::vector<double> dstudent(static_cast<size_t>(c.student_rows) * size_t(c.columns));
  bool good = true;
  for (size_t i = 0; i < c.images.size(); ++i) {
    const Image& image = c.images[i];
    double distance = 0.0, count = 0.0, size = 0.0;
    for (int32_t y = 0; y < image.h; ++y) {
      for (int32_t x = 0; x < image.w; ++x) {
        const int64_t row = image.student_row + y * image.w + x;
        const double u = c.token_weights.empty() ? 1.0 : double(c.token_weights[size_t(row)]);
        const Tap py = position_of(y, image.h, image.teacher_h), px = position_of(x, image.w, image.teacher_w);
        const int32_t ys[2] = {py.lower, py.upper}, xs[2] = {px.lower, px.upper};
        const double fy[2] = {1.0 - double(py.fraction), double(py.fraction)};
        const double fx[2] = {1.0 - double(px.fraction), double(px.fraction)};
        double ss = 0.0, rr = 0.0, sr = 0.0;
        for (int32_t d = 0; d < c.columns; ++d) {
          r[size_t(d)] = 0.0;
          for (int k = 0; k < 4; ++k) {
            const int64_t source = image.teacher_row + ys[k / 2] * image.teacher_w + xs[k % 2];
            r[size_t(d)] += fy[k / 2] * fx[k % 2] * c.teacher.value(source, d);
          }
          const double s = c.student.value(row, d);
          ss += s * s, rr += r[size_t(d)] * r[size_t(d)], sr += s * r[size_t(d)];
        }
        const double s_norm = std::fmax(std::sqrt(ss), 1e-8), r_norm = std::fmax(std::sqrt(rr), 1e-8);
        const double cosine = sr / (s_norm * r_norm);
        distance += u * (1.0 - cosine), count += u, size += std::fabs(u);
        for (int32_t d = 0; d < c.columns; ++d) {
          const double s = c.student.value(row, d), across = -u / (s_norm * r_norm);
          const double ds = across * r[size_t(d)] + (ss > 1e-16 ? u * cosine / (s_norm * s_norm) * s : 0.0);
          const double dr = across * s + (rr > 1e-16 ? u * cosine / (r_norm * r_norm) * r[size_t(d)] : 0.0);
          dstudent[size_t(row * c.columns + d)] = (c.units[0] ? 1.0 : kappa) * ds;
          for (int k = 0; k < 4; ++k) {
            const int64_t source = image.teacher_row + ys[k / 2] * image.teacher_w + xs[k % 2];
            dteacher[size_t(source * c.columns + d)] += (c.units[1] ? 1.0 : kappa) * fy[k / 2] * fx[k % 2] * dr;
          }
        }
      }
    }
    total += distance, total_size += size;
    if (std::fabs(count) > 1e-2 * size) {
      good &= close("mean", double(have.means[i]), distance / count, 1e-5 * size / std::fabs(count));
    }
  }
  good &= close("loss", double(have.loss), kappa * total, 1e-5 * std::fabs(kappa) * total_size);
  const std::vector<double>* exact[2] = {&dstudent, &dteacher};
  const Matrix* gradients[2] = {&have.dstudent, &have.dteacher};
  for (int i = 0; i < 2; ++i) {
    for (double value : *exact[i]) largest[i] = std::fmax(largest[i], std::fabs(value));
    if (!c.needs[i]) continue;
    const Dtype dtype = gradients[i]->dtype;
    const double limit = dtype == Dtype::float16 ? 65504.0 : std::numeric_limits<float>::max();
    const double tolerance = largest[i] * (2e-5 + epsilon_of(dtype)) + (dtype == Dtype::float16 ? 0x1p-24 : 0.0);
    if (largest[i] >= limit) continue;  // rows of zeros have gradients of size 1e8
    for (size_t j = 0; j < exact[i]->size() && good; ++j) {
      const double value = read(gradients[i]->memory.data() + j * size_t(size_of(dtype)), dtype);
      good &= close(i == 0 ? "dstudent" : "dteacher", value, (*exact[i])[j], tolerance);
    }
  }
  return good;
}

bool check_scale(Case& c, const CpuKernels& kernels) {
  Matrix from(1, c.integer(1, 100), 100, kDtypes[c.integer(0, 2)]);
  for (int64_t d = 0; d < from.columns; ++d) write(float(c.integer(-99, 99)) / 16.0f, from.at(0, d), from.dtype);
  Matrix to = from;
  const float factor = float(c.integer(-2, 2));
  kernels.scale({from.memory.data(), to.memory.data(), &factor, from.columns, from.dtype, 2, nullptr});
  bool good = true;
  for (int64_t d = 0; d < from.columns; ++d) {
    good &= close("scaled", to.value(0, d), double(factor) * from.value(0, d), 0.0);
  }
  return good;
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

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  bool good = check_conversions();
  for (const CpuKernels& kernels : kCpuKernels) {
    if (!kernels.supported()) continue;
    for (unsigned seed = 0; seed < cases && good; ++seed) {
      Case c(seed, seed + 1 == cases);
      const Result one = compute(c, kernels, 1);
      good = check(c, one) && compute(c, kernels, 1 + c.integer(1, 3)) == one && check_scale(c, kernels);
      if (!good) std::printf("%s, seed %u\n", kernels.isa, seed);
    }
  }
  std::printf("%s\n", good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
