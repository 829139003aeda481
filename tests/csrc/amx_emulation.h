// The AMX intrinsics that csrc uses, in plain C++ on eight emulated tile registers a thread, for processors without AMX
// and for the sanitizers, which do not see what the instructions read and write. Semantics of palette 1 as in Intel's
// manual, volume 2: LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBSSD, TDPBF16PS. What would be
// a fault is an abort
// with a message.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>  // before its intrinsics are replaced below

namespace amx_emulation {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tile {
  int rows, row_bytes;
  uint8_t data[kMaxRows][kMaxRowBytes];  // zero outside of rows and row_bytes
};

struct State {
  bool configured;
  Tile tiles[kTiles];
};

inline thread_local State state{};

// What tests look at: threads whose tiles are configured, and products so far, both of the whole process.
inline std::atomic<int> configured_threads{0};
inline std::atomic<int64_t> products{0};

// static: translation units for different instruction sets must not share them.
static inline void require(bool holds, const char* instruction, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "amx_emulation: %s: %s\n", instruction, what);
  std::abort();
}

static inline Tile& tile(int number, const char* instruction) {
  require(state.configured, instruction, "tiles are not configured");
  Tile& tile = state.tiles[number];
  require(tile.rows > 0, instruction, "this tile has no rows in the configuration");
  return tile;
}

template <int kTile>
static inline void check_number() {
  static_assert(0 <= kTile && kTile < kTiles, "tile registers are 0 to 7");
}

static inline void release() {
  if (state.configured) --configured_threads;
  state.configured = false;
  std::memset(state.tiles, 0, sizeof state.tiles);
}

static inline void load_config(const void* config) {
  constexpr const char* kName = "ldtilecfg";
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  if (bytes[0] == 0) return release();
  require(bytes[0] == 1, kName, "palette is neither 0 nor 1");
  require(bytes[1] == 0, kName, "start_row is not 0: only an interrupted instruction leaves one");
  const auto all_zero = [&bytes](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (bytes[i] != 0) return false;
    }
    return true;
  };
  require(all_zero(2, 16) && all_zero(16 + 2 * kTiles, 48) && all_zero(48 + kTiles, 64), kName,
          "a reserved byte is set");
  std::memset(state.tiles, 0, sizeof state.tiles);
  for (int i = 0; i < kTiles; ++i) {
    Tile& tile = state.tiles[i];
    tile.row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tile.rows = bytes[48 + i];
    require(tile.row_bytes <= kMaxRowBytes, kName, "more than 64 bytes a row");
    require(tile.rows <= kMaxRows, kName, "more than 16 rows");
    // The processor takes such a tile for unconfigured; here it can only be a mistake.
    require((tile.rows == 0) == (tile.row_bytes == 0), kName, "rows without bytes, or bytes without rows");
  }
  if (!state.configured) ++configured_threads;
  state.configured = true;
}

template <int kTile>
static inline void zero() {
  check_number<kTile>();
  std::memset(tile(kTile, "tilezero").data, 0, sizeof(Tile::data));
}

template <int kTile>
static inline void load(const void* base, int64_t stride) {
  check_number<kTile>();
  Tile& to = tile(kTile, "tileloadd");
  std::memset(to.data, 0, sizeof to.data);
  const char* from = static_cast<const char*>(base);
  for (int row = 0; row < to.rows; ++row) std::memcpy(to.data[row], from + row * stride, to.row_bytes);
}

template <int kTile>
static inline void store(void* base, int64_t stride) {
  check_number<kTile>();
  const Tile& from = tile(kTile, "tilestored");
  char* to = static_cast<char*>(base);
  for (int row = 0; row < from.rows; ++row) std::memcpy(to + row * stride, from.data[row], from.row_bytes);
}

template <int kC, int kA, int kB>
static inline void check_product(const char* instruction) {
  check_number<kC>();
  check_number<kA>();
  check_number<kB>();
  static_assert(kC != kA && kC != kB && kA != kB, "a product takes three different tiles");
  const Tile &c = tile(kC, instruction), &a = tile(kA, instruction), &b = tile(kB, instruction);
  const bool whole = c.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0;
  require(whole, instruction, "row bytes not a multiple of 4");
  require(c.rows == a.rows, instruction, "C and A differ in rows");
  require(c.row_bytes == b.row_bytes, instruction, "C and B differ in bytes a row");
  require(a.row_bytes / 4 == b.rows, instruction, "A's units are not as many as B's rows");
  ++products;
}

// c[m][n] += sum over k and i of a[m][4 k + i] * b[k][4 n + i], all int8, modulo 2^32.
template <int kC, int kA, int kB>
static inline void dpbssd() {
  check_product<kC, kA, kB>("tdpbssd");
  Tile& c = state.tiles[kC];
  const Tile &a = state.tiles[kA], &b = state.tiles[kB];
  for (int m = 0; m < c.rows; ++m) {
    uint32_t sums[kMaxRowBytes / 4];
    std::memcpy(sums, c.data[m], sizeof sums);
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        int32_t dot = 0;
        for (int i = 0; i < 4; ++i) {
          dot += static_cast<int8_t>(a.data[m][4 * k + i]) * static_cast<int8_t>(b.data[k][4 * n + i]);
        }
        sums[n] += static_cast<uint32_t>(dot);
      }
    }
    std::memcpy(c.data[m], sums, sizeof sums);
  }
}

// Subnormal numbers count as zero, as operands and as results.
static inline float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float bfloat16_at(const uint8_t* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

// c[m][n] += sum over k of a[m][2 k] * b[k][2 n], plus the same sum of the odd elements: bfloat16 products, float32
// sums by fused multiply-adds with k ascending.
template <int kC, int kA, int kB>
static inline void dpbf16ps() {
  check_product<kC, kA, kB>("tdpbf16ps");
  Tile& c = state.tiles[kC];
  const Tile &a = state.tiles[kA], &b = state.tiles[kB];
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < b.rows; ++k) {
        even = flushed(__builtin_fmaf(bfloat16_at(a.data[m], 2 * k), bfloat16_at(b.data[k], 2 * n), even));
        odd = flushed(__builtin_fmaf(bfloat16_at(a.data[m], 2 * k + 1), bfloat16_at(b.data[k], 2 * n + 1), odd));
      }
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() amx_emulation::release()
#define _tile_zero(tile) amx_emulation::zero<tile>()
#define _tile_loadd(tile, base, stride) amx_emulation::load<tile>(base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store<tile>(base, stride)
#define _tile_dpbssd(c, a, b) amx_emulation::dpbssd<c, a, b>()
#define _tile_dpbf16ps(c, a, b) amx_emulation::dpbf16ps<c, a, b>()
