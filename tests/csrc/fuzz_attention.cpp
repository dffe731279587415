// The host build of attention against a naive version in double precision, on random packs, heads, strides, dtypes,
// threads and options, for every instruction set that this processor has; and its plans against what they must be.
// Built with sanitizers by `make sanitize`. Runs all cases and says how many failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>
#include <vector>

#include "../../csrc/attention_plan.h"
#include "../../csrc/cpu_kernels.h"
#include "attention_packs.h"
#include "random_cases.h"

using namespace unigendet;

namespace {

constexpr double kUnit = 0x1p-24;  // the largest relative error of one operation in float32

// Of a sum of so many products in float32, relative to the sum of their sizes: roundings do not all go the same way.
double rounding_of(size_t terms) { return kUnit * (3.0 + std::sqrt(double(terms))); }

// [rows, heads, head_dim] with gaps, rows or heads outermost; if it is expanded, every row and head is the same memory.
struct Tensor {
  int64_t rows = 0, heads = 0, head_dim = 0, inner = 0;
  bool heads_first = false;
  Matrix memory;

  Tensor() = default;
  Tensor(Source& source, int64_t rows_, int64_t heads_, int64_t head_dim_, bool expanded = false)
      : rows(rows_), heads(heads_), head_dim(head_dim_) {
    heads_first = source.integer(0, 3) == 0;
    const int64_t outer = heads_first ? heads : rows, inside = heads_first ? rows : heads;
    inner = expanded ? 0 : head_dim + source.integer(0, 3);
    const int64_t columns = (inside - 1) * inner + head_dim;
    memory = Matrix(outer, columns, expanded ? 0 : columns + source.integer(0, 5), source.dtype, source.shift);
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < rows; ++row) {
      const float size = source.integer(0, 19) == 0 ? 0.0f : 1.0f;
      for (int64_t i = 0; i < heads * head_dim; ++i) set(row, i / head_dim, i % head_dim, size * normal(source.random));
    }
  }
  char* at(int64_t row, int64_t head, int64_t d) const {
    return heads_first ? memory.at(head, row * inner + d) : memory.at(row, head * inner + d);
  }
  void set(int64_t row, int64_t head, int64_t d, double value) { write(float(value), at(row, head, d), memory.dtype); }
  double value(int64_t row, int64_t head, int64_t d) const { return read(at(row, head, d), memory.dtype); }
  Heads view() const {
    return {memory.data, heads_first ? inner : memory.stride, heads_first ? memory.stride : inner};
  }
  // All numbers, [rows, heads, head_dim].
  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t i = 0; i < rows * heads * head_dim; ++i) {
      all.push_back(value(i / (heads * head_dim), i / head_dim % heads, i % head_dim));
    }
    return all;
  }
};

// What results must be, how far float32 arithmetic may be off, and the sizes of the terms added so far.
struct Wanted {
  std::vector<double> value, error, size;
  explicit Wanted(int64_t n) : value(size_t(n)), error(size_t(n)), size(size_t(n)) {}
  void add(size_t i, double term, double term_error) {
    value[i] += term, error[i] += term_error, size[i] += std::fabs(term);
  }
  void finish(size_t i, double relative) { error[i] += relative * size[i]; }
};

struct Case {
  Pack pack;
  Dtype dtype;
  int64_t q_heads, kv_heads, head_dim, keys;
  float scale;
  Tensor q, k, v, dout, out;  // out as the backward pass gets it, with its rows at out_rows
  Matrix lse, dlse;
  bool has_dlse, splits_dq;
  std::vector<int64_t> out_rows;  // or none

  explicit Case(Source& source, unsigned seed) : pack(draw_pack(source, seed)), dtype(source.dtype) {
    keys = pack.keys();
    draw_heads(source, seed);
    constexpr float kScales[] = {0.0f, -0.4f, 2.5f};
    const int64_t kind = source.integer(0, 9);
    scale = kind < 3 ? kScales[kind] : 1.0f / std::sqrt(float(head_dim));
    if (kind == 3) scale *= 100.0f;  // scores of several hundred
    q = Tensor(source, pack.queries, q_heads, head_dim);
    k = Tensor(source, keys, kv_heads, head_dim);
    v = Tensor(source, keys, kv_heads, head_dim);
    dout = Tensor(source, pack.queries, q_heads, head_dim, source.integer(0, 7) == 0);
    out = Tensor(source, pack.queries, q_heads, head_dim);
    lse = Matrix(q_heads, pack.queries, pack.queries, Dtype::float32, source.shift);
    dlse = source.floats(q_heads, pack.queries);
    has_dlse = source.integer(0, 1), splits_dq = source.integer(0, 1);
    if (source.integer(0, 1)) out_rows = source.permutation(pack.queries);
    // What nobody sees may be memory of a cache that has never been written.
    for (int64_t key = 0; key < keys; ++key) {
      if (pack.is_seen(key)) continue;
      const double anything = source.integer(0, 3) ? double(kNaN) : std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < kv_heads * head_dim; ++i) {
        k.set(key, i / head_dim, i % head_dim, anything), v.set(key, i / head_dim, i % head_dim, anything);
      }
    }
  }

  // Heads and head_dim at random, but not so many that a case takes long.
  void draw_heads(Source& source, unsigned seed) {
    constexpr int64_t kMostProducts = 400000;
    constexpr int64_t kGroups[] = {1, 2, 3, 7, 20};
    const bool is_wide = seed % 12 == 1;  // more heads in a group than a tile has rows
    int64_t group = is_wide ? source.integer(kTileRows + 1, kTileRows + 20) : kGroups[source.integer(0, 4)];
    kv_heads = is_wide ? 1 : source.integer(1, 3);
    head_dim = source.integer(0, 2) ? source.integer(1, kMaxHeadDim) : 16 * source.integer(1, kMaxHeadDim / 16);
    const auto is_much = [&] { return pack.pairs() * group * kv_heads * padded_floats(head_dim) > kMostProducts; };
    while (is_much() && kv_heads > 1) --kv_heads;
    while (is_much() && head_dim > 16) head_dim = (head_dim + 1) / 2;
    while (is_much() && group > 1 && !is_wide) group /= 2;
    q_heads = group * kv_heads;
  }

  int64_t out_row(int64_t query) const { return out_rows.empty() ? query : out_rows[size_t(query)]; }
  AttentionInputs inputs(const AttentionPlan& plan, int32_t threads) const {
    return {q.view(), k.view(), v.view(), dtype, pack.query_begin.data(), pack.query_end.data(),
            out_rows.empty() ? nullptr : out_rows.data(), pack.queries, keys, q_heads, kv_heads, head_dim, scale,
            plan.tiles.data(), int64_t(plan.tiles.size()), plan.blocks.data(), threads};
  }
  // Of one direction: the forward pass has all heads of a group in a tile, if they fit.
  int64_t tile_queries(bool forward) const {
    const int64_t group = q_heads / kv_heads;
    return forward && group <= kTileRows ? kTileRows / group : kTileRows;
  }
  AttentionPlan plan(bool forward) const { return plan_of(pack, kv_heads, tile_queries(forward)); }
};

// Both directions in double precision. The backward pass gets the output and lse rounded to their dtypes.
struct Truth {
  Wanted out, lse, dq, dk, dv;  // lse is [q_heads, queries], the others [rows, heads, head_dim]

  explicit Truth(Case& c)
      : out(c.pack.queries * c.q_heads * c.head_dim), lse(c.pack.queries * c.q_heads), dq(out),
        dk(c.keys * c.kv_heads * c.head_dim), dv(dk) {
    q = c.q.values(), k = c.k.values(), v = c.v.values();
    terms.resize(size_t(c.keys * c.kv_heads));
    for (int64_t head = 0; head < c.q_heads; ++head) {
      for (int64_t query = 0; query < c.pack.queries; ++query) {
        score(c, query, head);
        attend(c, query, head);
        differentiate(c, query, head);
      }
    }
    for (size_t i = 0; i < dk.value.size(); ++i) {
      const double relative = rounding_of(terms[i / size_t(c.head_dim)]);
      dk.finish(i, relative), dv.finish(i, relative);
    }
  }

 private:
  struct Score {
    size_t key_row;  // of k and v, counted in numbers
    double value, error;
  };
  std::vector<double> q, k, v;
  std::vector<size_t> terms;  // of the sums of dk and dv
  std::vector<Score> scores;

  static size_t query_row(const Case& c, int64_t query, int64_t head) {
    return size_t((query * c.q_heads + head) * c.head_dim);
  }

  // The scores of the keys that a query sees.
  void score(const Case& c, int64_t query, int64_t head) {
    scores.clear();
    const double* row = &q[query_row(c, query, head)];
    for (int64_t key = 0; key < c.keys; ++key) {
      if (query < c.pack.query_begin[size_t(key)] || query >= c.pack.query_end[size_t(key)]) continue;
      const size_t key_row = size_t((key * c.kv_heads + head / (c.q_heads / c.kv_heads)) * c.head_dim);
      double sum = 0.0, size = 0.0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const double term = double(c.scale) * row[d] * k[key_row + size_t(d)];
        sum += term, size += std::fabs(term);
      }
      scores.push_back({key_row, sum, rounding_of(size_t(c.head_dim)) * size});
    }
  }

  void attend(Case& c, int64_t query, int64_t head) {
    double most = scores[0].value, total = 0.0, mean_error = 0.0;
    for (const Score& s : scores) most = std::max(most, s.value);
    for (const Score& s : scores) total += std::exp(s.value - most);
    const size_t row = query_row(c, query, head), n = scores.size();
    for (const Score& s : scores) {
      // Of a weight: of its score, of subtractions from a maximum that rises, of a few exponentials.
      const double p = std::exp(s.value - most) / total, error = s.error + kUnit * (16.0 + 2.0 * (most - s.value));
      mean_error += p * error;
      for (size_t d = 0; d < size_t(c.head_dim); ++d) {
        const double term = p * v[s.key_row + d];
        out.add(row + d, term, std::fabs(term) * error);
      }
    }
    for (size_t d = 0; d < size_t(c.head_dim); ++d) {
      out.finish(row + d, rounding_of(n) + mean_error);
      c.out.set(c.out_row(query), head, int64_t(d), out.value[row + d]);
    }
    const size_t i = size_t(head * c.pack.queries + query);
    lse.value[i] = most + std::log(total);
    lse.error[i] = mean_error + rounding_of(n) + kUnit * (std::fabs(most) + std::log(total));
    write(float(lse.value[i]), c.lse.at(head, query), Dtype::float32);
  }

  void differentiate(const Case& c, int64_t query, int64_t head) {
    const size_t row = query_row(c, query, head), columns = size_t(c.head_dim), n = scores.size();
    const double given_lse = c.lse.value(head, query), relative = rounding_of(columns);
    std::vector<double> dout;
    double delta = c.has_dlse ? -c.dlse.value(head, query) : 0.0, delta_size = std::fabs(delta);
    for (int64_t d = 0; d < c.head_dim; ++d) {
      dout.push_back(c.dout.value(c.out_row(query), head, d));
      const double term = dout.back() * c.out.value(c.out_row(query), head, d);
      delta += term, delta_size += std::fabs(term);
    }
    for (const Score& s : scores) {
      double dp = 0.0, size = delta_size;
      for (size_t d = 0; d < columns; ++d) {
        const double term = dout[d] * v[s.key_row + d];
        dp += term, size += std::fabs(term);
      }
      const double exponent = s.value - given_lse, p = std::exp(exponent);
      const double p_error = s.error + kUnit * (8.0 + std::fabs(exponent)), ds = p * (dp - delta);
      const double ds_error = std::fabs(ds) * p_error + p * relative * size;
      for (size_t d = 0; d < columns; ++d) {
        const double scaled_q = double(c.scale) * q[row + d], scaled_k = double(c.scale) * k[s.key_row + d];
        dv.add(s.key_row + d, p * dout[d], p * std::fabs(dout[d]) * p_error);
        dk.add(s.key_row + d, ds * scaled_q, ds_error * std::fabs(scaled_q));
        dq.add(row + d, ds * scaled_k, ds_error * std::fabs(scaled_k));
      }
      ++terms[s.key_row / columns];
    }
    for (size_t d = 0; d < columns; ++d) dq.finish(row + d, rounding_of(n));
  }
};

// [rows, heads, head_dim] as a matrix [rows, heads * head_dim], whose row i is at row_of(i).
template <class RowOf>
bool within_all(const char* name, const Matrix& have, const Wanted& want, const RowOf& row_of) {
  for (int64_t i = 0; i < have.rows * have.columns; ++i) {
    const size_t at = size_t(i);
    if (!within(name, have, row_of(i / have.columns), i % have.columns, want.value[at], want.error[at])) return false;
  }
  return true;
}

bool check_forward(const Case& c, const Truth& truth, Source& source, const CpuKernels& kernels) {
  AttentionPlan plan = c.plan(true);
  sort_tiles(&plan);
  const auto compute = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(c.pack.queries, c.q_heads * c.head_dim));
    r.push_back(Matrix(c.q_heads, c.pack.queries, c.pack.queries, Dtype::float32, source.shift));
    const Floats scratch = workspace(threads * attention_scratch());
    kernels.attention({c.inputs(plan, threads), r[0].data, floats_of(r[1]), scratch.get()});
    return r;
  };
  return run(source, compute, [&](const Results& r) {
    return within_all("out", r[0], truth.out, [&](int64_t query) { return c.out_row(query); }) &
           within_all("lse", r[1], truth.lse, [](int64_t head) { return head; });
  });
}

// Keys that no query sees have a gradient of zero; those of no split are not written.
bool check_unseen(const char* name, const Case& c, const Matrix& have) {
  for (int64_t key = 0; key < c.keys; ++key) {
    for (int64_t i = 0; i < have.columns && !c.pack.is_seen(key); ++i) {
      const double value = have.value(key, i);
      if (c.pack.is_covered[size_t(key)] ? value == 0.0 : std::isnan(value)) continue;
      std::printf("%s[%lld, %lld] of an unseen key is %.9g\n", name, (long long)key, (long long)i, value);
      return false;
    }
  }
  return true;
}

bool check_backward(const Case& c, const Truth& truth, Source& source, const CpuKernels& kernels) {
  const AttentionPlan plan = c.plan(false);
  const bool in_dq = !c.splits_dq && c.dtype == Dtype::float32 && c.head_dim == padded_floats(c.head_dim);
  const auto compute = [&](int32_t threads) {
    Results r;
    r.push_back(source.output(c.pack.queries, c.q_heads * c.head_dim));
    for (int i = 0; i < 2; ++i) r.push_back(source.output(c.keys, c.kv_heads * c.head_dim));
    std::vector<float> delta(size_t(c.q_heads * c.pack.queries), kNaN);
    const Floats scratch = workspace(threads * attention_backward_scratch());
    const Floats first_parts = workspace(attention_dq_floats(c.pack.queries, c.q_heads, c.head_dim));
    const Floats more_parts = workspace(attention_dq_floats(plan.more_rows, c.q_heads, c.head_dim));
    kernels.attention_backward({c.inputs(plan, threads), c.dout.view(), c.out.view(), floats_of(c.lse),
                                c.has_dlse ? floats_of(c.dlse) : nullptr, plan.tasks.data(), int64_t(plan.tasks.size()),
                                r[0].data, r[1].data, r[2].data, delta.data(), in_dq,
                                in_dq ? nullptr : first_parts.get(), more_parts.get(), plan.more_rows, scratch.get()});
    return r;
  };
  const auto same_row = [](int64_t row) { return row; };
  return run(source, compute, [&](const Results& r) {
    bool good = within_all("dq", r[0], truth.dq, same_row);
    const Wanted* const wanted[] = {&truth.dk, &truth.dv};
    const char* const names[] = {"dk", "dv"};
    for (size_t i = 0; i < 2; ++i) {
      good &= check_unseen(names[i], c, r[i + 1]);
      for (int64_t at = 0; at < r[i + 1].rows * r[i + 1].columns && good; ++at) {
        const int64_t key = at / r[i + 1].columns;
        good = !c.pack.is_covered[size_t(key)] || within(names[i], r[i + 1], key, at % r[i + 1].columns,
                                                         wanted[i]->value[size_t(at)], wanted[i]->error[size_t(at)]);
      }
    }
    return good;
  });
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 240;
  int failures = 0;
  for (unsigned seed = 0; seed < cases; ++seed) {
    Source source(seed);
    Case c(source, seed);
    const Truth truth(c);
    for (const bool forward : {true, false}) {
      if (check_plan(c.pack, c.plan(forward), c.tile_queries(forward))) continue;
      std::printf("plan, seed %u\n", seed);
      ++failures;
    }
    for (const CpuKernels& kernels : kCpuKernels) {
      if (!kernels.supported()) continue;
      const bool good[] = {check_forward(c, truth, source, kernels), check_backward(c, truth, source, kernels)};
      if (good[0] && good[1]) continue;
      std::printf("%s, %s, seed %u\n", kernels.isa, good[0] ? "backward" : "forward", seed);
      ++failures;
    }
  }
  if (failures == 0) {
    std::printf("ok\n");
    return 0;
  }
  std::printf("FAILED: %d\n", failures);
  return 1;
}
