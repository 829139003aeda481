// Which rows of a tensor belong to which user, and which block works on which of them. Offsets live on the device and
// are never seen by the host: grids are made from shapes, and whatever the offsets say, no row outside the tensor is
// touched.
#pragma once

#include "primitives.cuh"

namespace grank::cuda {

constexpr int kTileRows = 64;  // rows of a block: four warps of 16

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [begin, begin + extent) of a tensor are a user's, and the first `count` of them are in use.
struct Rows {
  int64_t begin;
  int extent;
  int count;
};

// The rows of all users. Ragged: user b has the rows [offsets[b], offsets[b + 1]) of `total`. Dense, where there are no
// offsets: [b * per_user, (b + 1) * per_user). `used` tells how many of them count; all, where it is null.
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

  // How many (user, tile) pairs a grid must provide: an upper bound for ragged rows, from the shape alone.
  __host__ __device__ int64_t tiles() const {
    if (users == 0) return 0;
    return offsets != nullptr ? total / kTileRows + users : users * ceil_div(per_user, kTileRows);
  }
};

// A tile of kTileRows rows of one user.
struct RowTile {
  int64_t user;
  int first;  // row within the user's; at or beyond the extent: nothing to do
};

// The tile that is number `index` of RowGroups::tiles(). Ragged: user b owns the numbers from offset(b) / 64 + b on,
// one more than floor(offset(b + 1) / 64) - floor(offset(b) / 64), which is never fewer than its rows need. So a search
// in the offsets finds the user without sums over the users before; 32 lanes probe at a time. Called by whole warps.
__device__ inline RowTile find_tile(const RowGroups& groups, int64_t index) {
  if (groups.offsets == nullptr) {
    const int64_t per_user = ceil_div(groups.per_user, kTileRows);
    return {index / per_user, static_cast<int>(index % per_user) * kTileRows};
  }
  const int lane = threadIdx.x % kWarp;
  int64_t user = 0, span = groups.users;  // the answer lies in [user, user + span)
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
  return {user, first < 0 || first > extent ? extent : static_cast<int>(first)};  // offsets that decrease lead anywhere
}

}  // namespace grank::cuda
