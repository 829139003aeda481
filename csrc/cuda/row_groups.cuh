// The rows of each user in a tensor, and the rows of each block. Offsets are on the device and never read by the host:
// grids depend on shapes only. Offsets are clamped, so no value of theirs leads to a row outside the tensor.
#pragma once

#include "primitives.cuh"

namespace grank::cuda {

constexpr int kTileRows = 64;  // rows of a block: four warps of 16

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [begin, begin + extent) of a tensor belong to a user; the first `count` of them are valid.
struct Rows {
  int64_t begin;
  int extent;
  int count;
};

// The rows of all users. Ragged: user b has the rows [offsets[b], offsets[b + 1]) of `total`. Dense (offsets null):
// [b * per_user, (b + 1) * per_user). `used` is the number of valid rows per user; null: all.
struct RowGroups {
  const int64_t* offsets;  // (users + 1,) or null
  const int64_t* used;     // (users,) or null
  int64_t users;
  int64_t per_user;  // dense only
  int64_t total;     // below 2^31 - 64

  __device__ int64_t offset(int64_t user) const {
    const int64_t given = offsets[user];
    return given < 0 ? 0 : given > total ? total : given;
  }
  __device__ Rows rows(int64_t user) const {
    int64_t begin = user * per_user, extent = per_user;
    if (offsets != nullptr) {
      begin = offset(user);
      extent = offset(user + 1) - begin;
      if (extent < 0) extent = 0;
    }
    int64_t count = extent;
    if (used != nullptr && used[user] < count) count = used[user] < 0 ? 0 : used[user];
    return {begin, static_cast<int>(extent), static_cast<int>(count)};
  }

  // Number of (user, tile) pairs in a grid; for ragged rows an upper bound that depends on the shape only.
  __host__ __device__ int64_t tiles() const {
    if (users == 0) return 0;
    return offsets != nullptr ? total / kTileRows + users : users * ceil_div(per_user, kTileRows);
  }
};

// A tile of kTileRows rows of one user.
struct RowTile {
  int64_t user;
  int first;  // index of its first row within the user's rows; at or beyond the extent the tile is empty
};

// Tile `index` of RowGroups::tiles(). Ragged: the tiles of user b start at index offset(b) / 64 + b; their number is
// floor(offset(b + 1) / 64) - floor(offset(b) / 64) + 1, which always suffices for its rows. So a search in the offsets
// finds the user without a prefix sum; each of 32 lanes probes one offset per round. Must be called by whole warps.
__device__ inline RowTile find_tile(const RowGroups& groups, int64_t index) {
  if (groups.offsets == nullptr) {
    const int64_t per_user = ceil_div(groups.per_user, kTileRows);
    return {index / per_user, static_cast<int>(index % per_user) * kTileRows};
  }
  const int lane = threadIdx.x % kWarp;
  int64_t user = 0, span = groups.users;  // the user is in [user, user + span)
  while (span > 1) {
    const int64_t step = (span + kWarp - 1) / kWarp;
    const int64_t probe = user + lane * step;
    const bool reached = lane * step < span && groups.offset(probe) / kTileRows + probe <= index;
    const unsigned ballot = __ballot_sync(kFullMask, reached);
    int last = 0;
    while (last + 1 < kWarp && (ballot >> (last + 1)) & 1) ++last;
    const int64_t end = user + span;
    user += last * step;
    span = end - user < step ? end - user : step;
  }
  const int64_t first = (index - (groups.offset(user) / kTileRows + user)) * kTileRows;
  const int extent = groups.rows(user).extent;
  return {user, first < 0 || first > extent ? extent : static_cast<int>(first)};  // decreasing offsets give any value
}

}  // namespace grank::cuda
