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
  int32_t parts = 1;         // of dq
};

// `splits` is Layout.splits, [num_splits, 7], checked; query_begin and query_end are [keys]. A tile has at most
// `tile_queries` queries.
AttentionPlan plan_attention(const int64_t* splits, int64_t num_splits, const int32_t* query_begin,
                             const int32_t* query_end, int64_t kv_heads, int64_t tile_queries);

}  // namespace unigendet
