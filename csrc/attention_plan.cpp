// Compiled once: what comes from the standard library must not exist once per instruction set.
#include "attention_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace unigendet {
namespace {

constexpr int64_t kLongSplit = 64;    // splits of so many tokens begin and end a tile or a block
constexpr int64_t kPartKeys = 512;  // of a sample: each part of dq has as many
constexpr int64_t kMostParts = 4;
constexpr double kWantedTasks = 64;  // of a call, heads of keys counted

struct Split {
  int64_t mode, key_begin, key_end, sample_begin, sample_end, query_begin, query_end;
};

struct Range {
  int64_t begin, end;
};

// Ranges of one sample, which follow each other, as pieces of at most `limit` rows: long ranges apart, the others
// joined, and each cut into pieces of about the same length, a multiple of `unit`, as `limit` is.
std::vector<Range> cut(const std::vector<Range>& ranges, int64_t limit, int64_t unit) {
  std::vector<Range> joined, pieces;
  bool open = false;
  for (const Range& range : ranges) {
    const bool is_long = range.end - range.begin >= kLongSplit;
    if (open && !is_long) {
      joined.back().end = range.end;
    } else if (range.begin < range.end) {
      joined.push_back(range);
      open = !is_long;
    }
  }
  for (const Range& range : joined) {
    const int64_t length = range.end - range.begin, count = (length + limit - 1) / limit;
    const int64_t step = ((length + count - 1) / count + unit - 1) / unit * unit;
    for (int64_t begin = range.begin; begin < range.end; begin += step) {
      pieces.push_back({begin, std::min(begin + step, range.end)});
    }
  }
  return pieces;
}

AttentionBlock block_of(const Range& keys, const int32_t* query_begin, const int32_t* query_end) {
  AttentionBlock block{};
  block.begin = static_cast<int32_t>(keys.begin);
  block.end = static_cast<int32_t>(keys.end);
  block.least_begin = block.least_end = std::numeric_limits<int32_t>::max();
  block.most_begin = block.most_end = 0;
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    // A key that nobody sees makes the block one with a mask, but does not make it meet more queries.
    const bool seen = query_begin[key] < query_end[key];
    if (seen) block.least_begin = std::min(block.least_begin, query_begin[key]);
    if (seen) block.most_end = std::max(block.most_end, query_end[key]);
    block.most_begin = std::max(block.most_begin, query_begin[key]);
    block.least_end = std::min(block.least_end, query_end[key]);
  }
  return block;
}

// Pairs of queries and keys that a block's tiles have to compute.
int64_t pairs_of(const AttentionBlock& block) {
  return int64_t{block.end - block.begin} * std::max<int64_t>(int64_t{block.most_end} - block.least_begin, 0);
}

int64_t pairs_of(const std::vector<AttentionBlock>& blocks, size_t begin, size_t end) {
  int64_t pairs = 0;
  for (size_t i = begin; i < end; ++i) pairs += pairs_of(blocks[i]);
  return pairs;
}

struct Sample {
  size_t first_tile, end_tile, first_block, end_block;
};

// Tasks for a sample, one for each part, of about the same number of pairs. Returns how many there are.
int32_t add_tasks(AttentionPlan* plan, const Sample& sample, int64_t parts) {
  const int64_t pairs = pairs_of(plan->blocks, sample.first_block, sample.end_block);
  int64_t done = 0;
  int32_t made = 0;
  size_t next = sample.first_block;
  for (int64_t part = 0; part < parts; ++part) {
    const size_t first = next;
    AttentionTask task{};
    while (next < sample.end_block && (part == parts - 1 || done * parts < pairs * (part + 1))) {
      const int64_t more = pairs_of(plan->blocks[next++]);
      done += more, task.pairs += more;
    }
    if (first == next) continue;
    task.first_block = static_cast<int32_t>(first);
    task.end_block = static_cast<int32_t>(next);
    task.part = made++;
    plan->tasks.push_back(task);
  }
  return made;
}

// The tasks of all samples. A sample gets parts only for want of tasks: each costs memory for its queries.
void add_all_tasks(AttentionPlan* plan, const std::vector<Sample>& samples, int64_t kv_heads) {
  const double all = static_cast<double>(pairs_of(plan->blocks, 0, plan->blocks.size()));
  for (const Sample& sample : samples) {
    if (sample.first_block == sample.end_block) continue;
    const int64_t keys = plan->blocks[sample.end_block - 1].end - plan->blocks[sample.first_block].begin;
    const int64_t pairs = pairs_of(plan->blocks, sample.first_block, sample.end_block);
    const double share = static_cast<double>(pairs) / std::max(all, 1.0);
    const int64_t wanted = static_cast<int64_t>(std::ceil(share * kWantedTasks / static_cast<double>(kv_heads)));
    const int32_t parts = add_tasks(plan, sample, std::clamp<int64_t>(std::min(wanted, keys / kPartKeys), 1, kMostParts));
    if (sample.first_tile == sample.end_tile) continue;
    const int64_t begin = plan->tiles[sample.first_tile].begin, queries = plan->tiles[sample.end_tile - 1].end - begin;
    for (size_t i = sample.first_tile; i < sample.end_tile; ++i) {
      AttentionTile& tile = plan->tiles[i];
      tile.parts = parts;
      tile.more = plan->more_rows + tile.begin - begin;
      tile.sample_queries = queries;
    }
    plan->more_rows += (parts - 1) * queries;
  }
  std::stable_sort(plan->tasks.begin(), plan->tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return a.pairs > b.pairs; });
}

}  // namespace

AttentionPlan plan_attention(const int64_t* splits, int64_t num_splits, const int32_t* query_begin,
                             const int32_t* query_end, int64_t kv_heads, int64_t tile_queries) {
  AttentionPlan plan;
  std::vector<Sample> samples;
  const int64_t unit = tile_queries < 8 ? 1 : 8;
  const Split* table = reinterpret_cast<const Split*>(splits);
  for (int64_t first = 0; first < num_splits;) {
    int64_t end = first;
    std::vector<Range> queries, keys;
    for (; end < num_splits && table[end].sample_begin == table[first].sample_begin; ++end) {
      queries.push_back({table[end].query_begin, table[end].query_end});
      keys.push_back({table[end].key_begin, table[end].key_end});
    }
    const size_t first_tile = plan.tiles.size(), first_block = plan.blocks.size();
    for (const Range& range : cut(queries, tile_queries / unit * unit, unit)) {
      AttentionTile tile{};
      tile.begin = static_cast<int32_t>(range.begin);
      tile.end = static_cast<int32_t>(range.end);
      plan.tiles.push_back(tile);
    }
    for (const Range& range : cut(keys, kBlockKeys, 16)) {
      plan.blocks.push_back(block_of(range, query_begin, query_end));
      plan.covered_keys += range.end - range.begin;
    }
    for (size_t i = first_tile; i < plan.tiles.size(); ++i) {
      plan.tiles[i].first_block = static_cast<int32_t>(first_block);
      plan.tiles[i].end_block = static_cast<int32_t>(plan.blocks.size());
    }
    for (size_t i = first_block; i < plan.blocks.size(); ++i) {
      plan.blocks[i].first_tile = static_cast<int32_t>(first_tile);
      plan.blocks[i].end_tile = static_cast<int32_t>(plan.tiles.size());
    }
    samples.push_back({first_tile, plan.tiles.size(), first_block, plan.blocks.size()});
    first = end;
  }
  add_all_tasks(&plan, samples, kv_heads);
  return plan;
}

void sort_tiles(AttentionPlan* plan) {
  std::vector<std::pair<int64_t, AttentionTile>> tiles;
  for (const AttentionTile& tile : plan->tiles) {
    int64_t pairs = 0;
    for (int32_t i = tile.first_block; i < tile.end_block; ++i) {
      const AttentionBlock& block = plan->blocks[static_cast<size_t>(i)];
      const int64_t rows = int64_t{std::min(tile.end, block.most_end)} - std::max(tile.begin, block.least_begin);
      pairs += std::max<int64_t>(rows, 0) * (block.end - block.begin);
    }
    tiles.push_back({pairs, tile});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::transform(tiles.begin(), tiles.end(), plan->tiles.begin(), [](const auto& tile) { return tile.second; });
}

}  // namespace unigendet
