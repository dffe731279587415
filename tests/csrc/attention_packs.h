// Random packs for attention, and what a plan of one must be.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "../../csrc/attention_plan.h"
#include "random_cases.h"

namespace unigendet {

constexpr int64_t kCausal = 0, kNoise = 2, kSplitFields = 7;

// A layout as unigendet/layout.py describes it.
struct Pack {
  std::vector<int64_t> splits;
  std::vector<int32_t> query_begin, query_end;
  std::vector<bool> is_covered;  // of each key: whether it is a token, not a spare row
  std::vector<std::pair<int64_t, int64_t>> query_ranges, key_ranges;  // of each sample
  int64_t queries = 0;

  int64_t keys() const { return int64_t(query_begin.size()); }
  bool is_seen(int64_t key) const { return query_begin[size_t(key)] < query_end[size_t(key)]; }
  bool sees(int64_t query, int64_t key) const {
    return query_begin[size_t(key)] <= query && query < query_end[size_t(key)];
  }
  int64_t pairs() const {
    int64_t sum = 0;
    for (int64_t key = 0; key < keys(); ++key) sum += query_end[size_t(key)] - query_begin[size_t(key)];
    return sum;
  }

  // Splits as (mode, length), of which the first `cached` tokens are keys only, and `spare` rows behind them.
  void add_sample(const std::vector<std::pair<int64_t, int64_t>>& parts, int64_t cached, int64_t spare) {
    const int64_t first_key = keys(), first_query = queries;
    const auto query_of = [&](int64_t token) { return first_query + std::max<int64_t>(token - cached, 0); };
    int64_t tokens = 0, begin = 0;
    for (const auto& part : parts) tokens += part.second;
    for (const auto& part : parts) {
      const int64_t end = begin + part.second;
      splits.insert(splits.end(), {part.first, first_key + begin, first_key + end, first_key, first_key + tokens,
                                   query_of(begin), query_of(end)});
      for (int64_t token = begin; token < end; ++token) {
        query_begin.push_back(int32_t(query_of(part.first == kCausal ? token : begin)));
        query_end.push_back(int32_t(query_of(part.first == kNoise ? end : tokens)));
      }
      begin = end;
    }
    queries = query_of(tokens);
    is_covered.resize(size_t(first_key + tokens), true);
    query_begin.resize(size_t(first_key + tokens + spare), 0), query_end.resize(size_t(first_key + tokens + spare), 0);
    is_covered.resize(size_t(first_key + tokens + spare), false);
    query_ranges.push_back({first_query, queries});
    key_ranges.push_back({first_key, first_key + tokens});
  }
};

inline Pack draw_pack(Source& source, unsigned seed) {
  Pack pack;
  if (seed % 40 == 3) {  // so many keys that dq has parts
    const int64_t cached = source.integer(2100, 4500);
    pack.add_sample({{source.integer(0, 2), 5}}, 0, 0);
    pack.add_sample({{1, cached - 30}, {source.integer(0, 1), 30 + source.integer(1, 20)}}, cached, 3);
    return pack;
  }
  // Short ones mostly: of them a case can have many heads.
  constexpr int64_t kLongest[] = {8, 16, 24, 90, 200};
  const int64_t longest = kLongest[seed % 12 == 1 ? 0 : source.integer(0, 4)];
  for (int64_t samples = source.integer(1, 3); samples > 0 || pack.queries == 0; --samples) {
    std::vector<std::pair<int64_t, int64_t>> parts;
    int64_t tokens = 0;
    for (int64_t count = source.integer(1, 5); count > 0; --count) {
      parts.push_back({source.integer(0, 2), source.integer(1, source.integer(0, 1) ? 8 : longest)});
      tokens += parts.back().second;
    }
    const bool has_cache = source.integer(0, 2) == 0;
    pack.add_sample(parts, has_cache ? source.integer(0, tokens) : 0, source.integer(0, 2) ? 0 : source.integer(1, 40));
  }
  return pack;
}

inline AttentionPlan plan_of(const Pack& pack, int64_t kv_heads, int64_t tile_queries) {
  return plan_attention(pack.splits.data(), int64_t(pack.splits.size()) / kSplitFields, pack.query_begin.data(),
                        pack.query_end.data(), kv_heads, tile_queries);
}

// Whether ranges of `pieces` from piece `*next` on cover [begin, end) in order, each of 1 to `limit` rows.
template <class Piece>
bool covers(const std::vector<Piece>& pieces, size_t* next, int64_t begin, int64_t end, int64_t limit) {
  for (; begin < end; ++*next) {
    if (*next >= pieces.size()) return false;
    const Piece& piece = pieces[*next];
    if (piece.begin != begin || piece.end <= begin || piece.end > end || piece.end - begin > limit) return false;
    begin = piece.end;
  }
  return true;
}

// Tiles and blocks hold each query and each token once, in order, and know each other; the numbers of a block say which
// queries see all of its keys, and which see none.
inline bool check_pieces(const Pack& pack, const AttentionPlan& plan, int64_t tile_queries) {
  size_t tile = 0, block = 0;
  int64_t covered = 0;
  for (size_t sample = 0; sample < pack.key_ranges.size(); ++sample) {
    const size_t first_tile = tile, first_block = block;
    const auto queries = pack.query_ranges[sample], keys = pack.key_ranges[sample];
    if (!covers(plan.tiles, &tile, queries.first, queries.second, tile_queries)) return false;
    if (!covers(plan.blocks, &block, keys.first, keys.second, kBlockKeys)) return false;
    covered += keys.second - keys.first;
    for (size_t i = first_tile; i < tile; ++i) {
      if (plan.tiles[i].first_block != int32_t(first_block) || plan.tiles[i].end_block != int32_t(block)) return false;
    }
    for (size_t i = first_block; i < block; ++i) {
      const AttentionBlock& b = plan.blocks[i];
      if (b.first_tile != int32_t(first_tile) || b.end_tile != int32_t(tile)) return false;
      for (int64_t query = queries.first; query < queries.second; ++query) {
        int64_t seen = 0;
        for (int64_t key = b.begin; key < b.end; ++key) seen += pack.sees(query, key);
        const bool is_whole = b.most_begin <= query && query < b.least_end;
        if (is_whole != (seen == b.end - b.begin)) return false;
        if (seen > 0 && (query < b.least_begin || query >= b.most_end)) return false;
      }
    }
  }
  return tile == plan.tiles.size() && block == plan.blocks.size() && covered == plan.covered_keys;
}

// Tasks hold each block once, those of one part no sample twice, the largest first; a long sample has several parts, whose
// rows of dq no other has.
inline bool check_tasks(const Pack& pack, const AttentionPlan& plan) {
  std::vector<int> times(plan.blocks.size());
  std::vector<std::pair<int64_t, int64_t>> sample_parts;
  int64_t most_keys = 0, previous = plan.tasks.empty() ? 0 : plan.tasks[0].pairs;
  for (const auto& keys : pack.key_ranges) most_keys = std::max(most_keys, keys.second - keys.first);
  for (const AttentionTask& task : plan.tasks) {
    if (task.first_block < 0 || task.first_block >= task.end_block || size_t(task.end_block) > times.size() ||
        task.pairs > previous) {
      return false;
    }
    previous = task.pairs;
    for (int32_t i = task.first_block; i < task.end_block; ++i) ++times[size_t(i)];
    const std::pair<int64_t, int64_t> first{plan.blocks[size_t(task.first_block)].begin, INT64_MAX};
    const auto sample = std::upper_bound(pack.key_ranges.begin(), pack.key_ranges.end(), first);
    if (plan.blocks[size_t(task.end_block) - 1].end > sample[-1].second) return false;  // of two samples
    sample_parts.push_back({sample - pack.key_ranges.begin(), task.part});
  }
  std::sort(sample_parts.begin(), sample_parts.end());
  std::vector<int> rows(size_t(plan.more_rows));
  for (const AttentionTile& tile : plan.tiles) {
    // The sample's parts are numbered from 0.
    const int64_t key = plan.blocks[size_t(tile.first_block)].begin;
    const auto sample = std::upper_bound(pack.key_ranges.begin(), pack.key_ranges.end(), std::make_pair(key, INT64_MAX));
    const int64_t number = sample - pack.key_ranges.begin();
    for (int64_t part = 0; part <= tile.parts; ++part) {
      const bool is_there = std::binary_search(sample_parts.begin(), sample_parts.end(), std::make_pair(number, part));
      if (is_there != (part < tile.parts)) return false;
    }
    for (int64_t part = 1; part < tile.parts; ++part) {
      for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
        const int64_t row = tile.more + (part - 1) * tile.sample_queries + i;
        if (row < 0 || row >= plan.more_rows) return false;
        ++rows[size_t(row)];
      }
    }
  }
  const auto once = [](int n) { return n == 1; };
  return std::adjacent_find(sample_parts.begin(), sample_parts.end()) == sample_parts.end() &&
         std::all_of(times.begin(), times.end(), once) && std::all_of(rows.begin(), rows.end(), once) &&
         (plan.more_rows > 0 ? most_keys > 1000 : most_keys < 2100);
}

inline bool check_plan(const Pack& pack, const AttentionPlan& plan, int64_t tile_queries) {
  const bool pieces = check_pieces(pack, plan, tile_queries), tasks = check_tasks(pack, plan);
  if (!pieces) std::printf("tiles or blocks are wrong\n");
  if (!tasks) std::printf("tasks are wrong\n");
  return pieces && tasks;
}

}  // namespace unigendet
