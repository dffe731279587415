// How the host build of attention cuts a pack: tiles of queries, blocks of keys, and which of them meet.
#pragma once

#include <stdint.h>

#include <vector>

#include "params.h"

namespace unigendet {

struct AttentionPlan {
  std::vector<AttentionTile> tiles;
  std::vector<AttentionBlock> blocks;
  std::vector<AttentionTask> tasks;
  int64_t covered_keys = 0;  // the blocks' keys: not the spare rows of a cache
  int64_t more_rows = 0;     // of all parts of dq but the first ones
};

// `splits` is Layout.splits, [num_splits, 7], checked; query_begin and query_end are [keys]. A tile has at most
// `tile_queries` queries. The tasks are for the backward pass and come with those of the most pairs first.
AttentionPlan plan_attention(const int64_t* splits, int64_t num_splits, const int32_t* query_begin,
                             const int32_t* query_end, int64_t kv_heads, int64_t tile_queries);

// The tiles with the most pairs first, as threads of the forward pass should take them. Blocks then know their tiles no more.
void sort_tiles(AttentionPlan* plan);

}  // namespace unigendet
