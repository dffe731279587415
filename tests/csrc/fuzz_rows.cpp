// The host builds of the ops on rows against naive versions in double precision, on random sizes, strides, dtypes, threads
// and options, for every instruction set that this processor has. Built with sanitizers by `make sanitize`. Runs all cases
// and says how many failed.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "../../csrc/cpu_kernels.h"
#include "random_cases.h"

using namespace unigendet;

namespace {

constexpr double kRounding = 1e-5;  // of a few hundred float operations, relative to the size of their terms
constexpr float kEps = 1e-6f;
constexpr double kLeastSigma = 3e-39;  // of e^-g that is finite in float: below it the logistic function may be 0

// One number: `size` is that of the terms added.
bool near(const char* name, const Matrix& have, int64_t row, int64_t d, double want, double size, int roundings = 1) {
  return within(name, have, row, d, want, kRounding * size, roundings);
}

// A gradient of the streams' weights: for each row whether it is wanted, else it must not be written.
bool near_sums(const char* name, const Matrix& have, const std::vector<double>& want, const std::vector<double>& sizes,
               const bool (&needed)[2]) {
  bool good = true;
  for (int64_t row = 0; row < have.rows; ++row) {
    for (int64_t d = 0; d < have.columns && good; ++d) {
      const size_t i = size_t(row * have.columns + d);
      if (needed[row % 2]) {
        good = near(name, have, row, d, want[i], sizes[i]);
      } else if (!std::isnan(have.value(row, d))) {
        std::printf("%s of stream %lld is written\n", name, (long long)row % 2);
        good = false;
      }
    }
  }
  return good;
}

bool check_rms_norm(Source& source, const CpuKernels& kernels) {
  const int64_t rows = source.integer(1, 300), columns = source.integer(1, 5) == 1 ? 64 : source.integer(1, 90);
  const int64_t n = source.integer(0, rows);
  const bool has_residual = source.integer(0, 1), needs_ds = source.integer(0, 3) > 0;
  const bool needs[2] = {source.integer(0, 3) > 0, source.integer(0, 3) > 0};
  const Matrix x = source.input(rows, columns), residual = source.input(rows, columns), dy = source.input(rows, columns);
  const Matrix weights = source.floats(2, columns);
  const auto forward = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(rows, columns));
    r.push_back(source.output(rows, columns));
    r.push_back(Matrix(1, rows, rows, Dtype::float32, source.shift));
    kernels.rms_norm({x.view(), {has_residual ? residual.data : nullptr, residual.stride, source.dtype},
                      floats_of(weights), rows, n, columns, kEps, r[0].data, has_residual ? r[1].data : nullptr,
                      floats_of(r[2]), threads});
    return r;
  };
  const auto is_right = [&](const Results& r) {
    bool good = true;
    for (int64_t row = 0; row < rows && good; ++row) {
      std::vector<double> s;
      double squares = 0.0;
      for (int64_t d = 0; d < columns; ++d) {
        s.push_back(has_residual ? rounded(x.value(row, d) + residual.value(row, d), source.dtype) : x.value(row, d));
        squares += s.back() * s.back();
        if (has_residual) good &= near("summed", r[1], row, d, s.back(), 0.0);
      }
      const double rstd = 1.0 / std::sqrt(squares / double(columns) + double(kEps));
      good &= near("rstd", r[2], 0, row, rstd, rstd);
      for (int64_t d = 0; d < columns && good; ++d) {
        const double h = s[size_t(d)] * rstd, y = weights.value(row < n ? 0 : 1, d) * h;
        good &= near("normed", r[0], row, d, y, std::fabs(y), 3);
      }
    }
    return good;
  };
  const Results done = forward(1);
  const auto backward = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(rows, columns));
    r.push_back(Matrix(2, columns, columns, Dtype::float32, source.shift));
    const Floats partials = workspace(rms_norm_partials(rows, n, columns, threads));
    kernels.rms_norm_backward({dy.view(), {has_residual ? residual.data : nullptr, residual.stride, source.dtype},
                               x.view(), floats_of(done[2]), floats_of(weights), rows, n, columns,
                               needs_ds ? r[0].data : nullptr, floats_of(r[1]), {needs[0], needs[1]}, partials.get(),
                               threads});
    return r;
  };
  const auto is_right_backward = [&](const Results& r) {
    bool good = true;
    std::vector<double> dw(size_t(2 * columns)), sizes(size_t(2 * columns));
    for (int64_t row = 0; row < rows; ++row) {
      const double rstd = done[2].value(0, row);
      const int64_t stream = row < n ? 0 : 1;
      double mean = 0.0, mean_size = 0.0;
      for (int64_t d = 0; d < columns; ++d) {
        const double h = x.value(row, d) * rstd, term = dy.value(row, d) * h;
        dw[size_t(stream * columns + d)] += term, sizes[size_t(stream * columns + d)] += std::fabs(term);
        mean += term * weights.value(stream, d) / double(columns);
        mean_size += std::fabs(term * weights.value(stream, d)) / double(columns);
      }
      for (int64_t d = 0; d < columns && good && needs_ds; ++d) {
        const double h = x.value(row, d) * rstd, g = dy.value(row, d) * weights.value(stream, d);
        const double more = has_residual ? residual.value(row, d) : 0.0;
        const double size = rstd * (std::fabs(g) + std::fabs(h) * mean_size) + std::fabs(more);
        good = near("ds", r[0], row, d, rstd * (g - h * mean) + more, size);
      }
    }
    return good & near_sums("dweights", r[1], dw, sizes, needs);
  };
  return run(source, forward, is_right) & run(source, backward, is_right_backward);
}

bool check_swiglu(Source& source, const CpuKernels& kernels) {
  const int64_t rows = source.integer(1, 200), columns = source.integer(1, 5) == 1 ? 64 : source.integer(1, 90);
  const Matrix gate_up = source.input(rows, 2 * columns, source.integer(0, 1) ? 1.0f : 40.0f);
  const Matrix dy = source.input(rows, columns);
  const auto forward = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(rows, columns));
    kernels.swiglu({gate_up.view(), rows, columns, r[0].data, threads});
    return r;
  };
  const auto backward = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(rows, 2 * columns));
    kernels.swiglu_backward({dy.view(), gate_up.view(), rows, columns, r[0].data, threads});
    return r;
  };
  const auto each = [&](const auto& right) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < columns; ++d) {
        const double g = gate_up.value(row, d), u = gate_up.value(row, columns + d);
        if (!right(row, d, g, u, 1.0 / (1.0 + std::exp(-g)))) return false;
      }
    }
    return true;
  };
  // In units of kRounding: a few roundings of sigma.
  const auto error_of = [](double sigma) { return 0.1 * sigma + kLeastSigma / kRounding; };
  const auto is_right = [&](const Results& r) {
    return each([&](int64_t row, int64_t d, double g, double u, double sigma) {
      return near("out", r[0], row, d, g * sigma * u, std::fabs(g * u) * error_of(sigma));
    });
  };
  const auto is_right_backward = [&](const Results& r) {
    return each([&](int64_t row, int64_t d, double g, double u, double sigma) {
      const double incoming = dy.value(row, d), size = std::fabs(incoming * u) * (1.0 + std::fabs(g));
      return near("dgate", r[0], row, d, incoming * u * sigma * (1.0 + g * (1.0 - sigma)), size * error_of(sigma)) &&
             near("dup", r[0], row, columns + d, incoming * g * sigma, std::fabs(incoming * g) * error_of(sigma));
    });
  };
  return run(source, forward, is_right) & run(source, backward, is_right_backward);
}

struct RopeCase {
  int64_t rows, n, q_heads, kv_heads, head_dim, positions;
  Matrix qkv, weights, cos, sin;
  std::vector<int64_t> to_stream, to_sequence, position;

  explicit RopeCase(Source& source) {
    constexpr int64_t kWidths[] = {32, 64, 128, 72, 8, 2};
    rows = source.integer(1, 200), n = source.integer(0, rows);
    q_heads = source.integer(1, 4), kv_heads = source.integer(1, 2);
    head_dim = kWidths[source.integer(0, 5)], positions = source.integer(1, 40);
    qkv = source.input(rows, (q_heads + 2 * kv_heads) * head_dim);
    weights = source.floats(4, head_dim);
    cos = source.floats(positions, head_dim / 2);
    sin = source.floats(positions, head_dim / 2);
    to_stream = to_sequence = source.permutation(rows);
    for (int64_t i = 0; i < rows; ++i) to_sequence[size_t(to_stream[size_t(i)])] = i;
    for (int64_t i = 0; i < rows; ++i) position.push_back(source.integer(0, positions - 1));
  }
  QkNormRopeInputs inputs(const std::vector<int64_t>& map) const {
    return {qkv.view(), floats_of(weights), floats_of(cos), floats_of(sin), map.data(), position.data(), rows, n,
            q_heads, kv_heads, head_dim, kEps};
  }
  double weight(int64_t row, int64_t head, int64_t d) const {
    return weights.value((head < q_heads ? 0 : 2) + (row < n ? 0 : 1), d);
  }
  double rstd(int64_t row, int64_t head) const {
    double squares = 0.0;
    for (int64_t d = 0; d < head_dim; ++d) squares += std::pow(qkv.value(row, head * head_dim + d), 2);
    return 1.0 / std::sqrt(squares / double(head_dim) + double(kEps));
  }
  // The rotation's matrix for column d: its own factor, and that of the other half's column.
  std::pair<double, double> factors(int64_t sequence_row, int64_t d) const {
    const int64_t half = head_dim / 2, p = position[size_t(sequence_row)];
    const double s = sin.value(p, d % half);
    return {cos.value(p, d % half), d < half ? -s : s};
  }
};

bool check_rope(Source& source, const CpuKernels& kernels) {
  const RopeCase c(source);
  const int64_t half = c.head_dim / 2, heads = c.q_heads + c.kv_heads;
  const auto forward = [&](int32_t threads) {
    Results r;
    for (int64_t h : {c.q_heads, c.kv_heads, c.kv_heads}) r.push_back(source.output(c.rows, h * c.head_dim));
    kernels.qk_norm_rope({c.inputs(c.to_stream), r[0].data, r[1].data, r[2].data, threads});
    return r;
  };
  const auto is_right = [&](const Results& r) {
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t from = c.to_stream[size_t(row)];
      for (int64_t head = 0; head < heads + c.kv_heads; ++head) {
        const Matrix& out = r[head < c.q_heads ? 0 : head < heads ? 1 : 2];
        const int64_t start = (head < c.q_heads ? head : head < heads ? head - c.q_heads : head - heads) * c.head_dim;
        const double rstd = c.rstd(from, head);
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const int64_t other = (d + half) % c.head_dim;
          const auto x = [&](int64_t i) { return c.qkv.value(from, head * c.head_dim + i); };
          const auto normed = [&](int64_t i) { return x(i) * rstd * c.weight(from, head, i); };
          if (head >= heads) {
            if (!near("v", out, row, start + d, x(d), 0.0)) return false;
            continue;
          }
          const auto [own, cross] = c.factors(row, d);
          const double first = own * normed(d), second = cross * normed(other);
          const double size = std::fabs(first) + std::fabs(second);
          if (!near("q or k", out, row, start + d, first + second, size)) return false;
        }
      }
    }
    return true;
  };
  return run(source, forward, is_right);
}

bool check_rope_backward(Source& source, const CpuKernels& kernels) {
  const RopeCase c(source);
  const int64_t half = c.head_dim / 2, heads = c.q_heads + c.kv_heads, width = (heads + c.kv_heads) * c.head_dim;
  const bool needs_dqkv = source.integer(0, 3) > 0;
  const bool needs[2] = {source.integer(0, 3) > 0, source.integer(0, 3) > 0};
  // [rows, heads, head_dim] with gaps after each head.
  const int64_t gap = source.integer(0, 3);
  Matrix gradients[3];
  const int64_t counts[3] = {c.q_heads, c.kv_heads, c.kv_heads};
  for (int i = 0; i < 3; ++i) gradients[i] = source.matrix(c.rows * counts[i], c.head_dim, c.head_dim + gap, source.dtype);
  const auto view = [&](int i) { return Heads{gradients[i].data, counts[i] * gradients[i].stride, gradients[i].stride}; };
  const auto backward = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(c.rows, width));
    r.push_back(Matrix(4, c.head_dim, c.head_dim, Dtype::float32, source.shift));
    const Floats partials = workspace(qk_norm_rope_partials(c.rows, c.n, c.head_dim, threads));
    kernels.qk_norm_rope_backward({c.inputs(c.to_sequence), view(0), view(1), view(2), needs_dqkv ? r[0].data : nullptr,
                                   floats_of(r[1]), {needs[0], needs[1]}, partials.get(), threads});
    return r;
  };
  const auto is_right = [&](const Results& r) {
    std::vector<double> dw(size_t(4 * c.head_dim)), sizes(size_t(4 * c.head_dim));
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t from = c.to_sequence[size_t(row)];
      for (int64_t head = 0; head < heads + c.kv_heads; ++head) {
        const int part = head < c.q_heads ? 0 : head < heads ? 1 : 2;
        const int64_t line = from * counts[part] + (part == 0 ? head : part == 1 ? head - c.q_heads : head - heads);
        const auto dy = [&](int64_t d) { return gradients[part].value(line, d); };
        const double rstd = c.rstd(row, head);
        double mean = 0.0, mean_size = 0.0;
        std::vector<double> dn, dn_size;
        for (int64_t d = 0; d < c.head_dim && part < 2; ++d) {
          const auto [own, cross] = c.factors(from, d);  // transposed: the other half's factor has the other sign
          const int64_t other = (d + half) % c.head_dim;
          dn.push_back(own * dy(d) - cross * dy(other));
          dn_size.push_back(std::fabs(own * dy(d)) + std::fabs(cross * dy(other)));
          const double h = c.qkv.value(row, head * c.head_dim + d) * rstd;
          const size_t i = size_t((2 * part + (row < c.n ? 0 : 1)) * c.head_dim + d);
          dw[i] += dn.back() * h, sizes[i] += dn_size.back() * std::fabs(h);
          mean += dn.back() * c.weight(row, head, d) * h / double(c.head_dim);
          mean_size += dn_size.back() * std::fabs(c.weight(row, head, d) * h) / double(c.head_dim);
        }
        for (int64_t d = 0; d < c.head_dim && needs_dqkv; ++d) {
          const int64_t column = head * c.head_dim + d;
          if (part == 2) {
            if (!near("dv", r[0], row, column, dy(d), 0.0)) return false;
            continue;
          }
          const double h = c.qkv.value(row, column) * rstd, w = c.weight(row, head, d);
          const double size = rstd * (std::fabs(w) * dn_size[size_t(d)] + std::fabs(h) * mean_size);
          if (!near("dqkv", r[0], row, column, rstd * (w * dn[size_t(d)] - h * mean), size)) return false;
        }
      }
    }
    return near_sums("dweights", r[1], dw, sizes, needs);
  };
  return run(source, backward, is_right);
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 60;
  bool (*const checks[])(Source&, const CpuKernels&) = {check_rms_norm, check_swiglu, check_rope, check_rope_backward};
  int failures = 0;
  for (unsigned seed = 0; seed < cases; ++seed) {
    for (const CpuKernels& kernels : kCpuKernels) {
      if (!kernels.supported()) continue;
      for (size_t i = 0; i < sizeof checks / sizeof checks[0]; ++i) {
        Source source(seed);
        if (checks[i](source, kernels)) continue;
        std::printf("%s, check %zu, seed %u\n", kernels.isa, i, seed);
        ++failures;
      }
    }
  }
  if (failures == 0) {
    std::printf("ok\n");
    return 0;
  }
  std::printf("FAILED: %d\n", failures);
  return 1;
}
