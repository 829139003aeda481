// The schedule of a tile: small-batch, panel or AMX path, and the prefetch distances (mips_topk_kernel.h).
#include "mips_topk_kernel.h"

#include "mips_topk_multiply.h"

namespace grank {
namespace GRANK_ISA {
namespace {

#if GRANK_AMX
static_assert(kRowsAtOnce == kTileRows, "a block of queries meets all rows of a tile at once");

void scan_packed_amx(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, const uint32_t* panel,
                     Prefetcher prefetcher, MipsTopkEmit emit, void* context) {
  TileRegisters registers;
  alignas(64) int32_t sums[kAmxQueries][kTileRows];
  const auto* packed = static_cast<const char*>(queries.packed);
  for (int64_t first = 0; first < queries.count; first += kAmxQueries) {
    const bool whole = queries.count - first >= kAmxQueries;
    const int block = whole ? kAmxQueries : static_cast<int>(queries.count - first);
    if (first == 0 || !whole) registers.configure(block);
    multiply_tiles(panel, packed + queries_bytes(DType::kInt8, first, d), block, amx_steps(d), prefetcher, sums);
    for (int q = 0; q < block; ++q) {
      Ints sum[1][kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) sum[0][v] = load<Ints>(&sums[q][v * kLanes]);
      emit_wanted<Int8Products, 1>(sum, tile, queries, first + q, 0, emit, context);
    }
  }
}
#endif

// Largest batch whose products finish before the next tile could be prefetched.
int64_t max_packing_bound(DType dtype) {
  if (kAmx && dtype == DType::kInt8) return 3 * kAmxQueries;
  return max_small_batch(dtype) > kQueryBlock ? max_small_batch(dtype) : kQueryBlock;
}

// `early` prefetches during transposition, `late` during multiplication.
template <typename Products, DType kType>
void scan_tile(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, uint32_t* panel, Prefetcher early,
               Prefetcher late, MipsTopkEmit emit, void* context) {
  if (queries.count <= max_small_batch(kType)) {
    return scan_at_least<Products, kType, 1>(d, tile, queries, early, emit, context);
  }
  pack<kType>(tile, d, early, panel);
#if GRANK_AMX
  if (kType == DType::kInt8) return scan_packed_amx(d, tile, queries, panel, late, emit, context);
#endif
  scan_packed<Products>(kType, d, tile, queries, panel, late, emit, context);
}

void scan_tile(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
               MipsTopkEmit emit, void* context) {
  auto* units = static_cast<uint32_t*>(panel);
  // Few queries are packing-bound: packing prefetches kPrefetchBytes ahead. Many are compute-bound: the
  // multiplication prefetches the whole next tile.
  const int64_t tile_bytes = tile.list == nullptr ? kTileRows * tile.row_stride : 0;
  const bool few = queries.count <= max_packing_bound(dtype);
  const char* near = tile.rows + kPrefetchBytes;
  const char* next = tile.rows + tile_bytes;
  for (int64_t page = 0; page < tile_bytes; page += 4096) {  // hides the TLB misses
    __builtin_prefetch(tile.rows + kPagesBytes + page, 0, 2);
  }
  const Prefetcher early{near, few ? near + tile_bytes : near}, late{next, few ? next : next + tile_bytes};
  switch (dtype) {
    case DType::kFloat32:
      return scan_tile<FloatProducts, DType::kFloat32>(d, tile, queries, units, early, late, emit, context);
    case DType::kFloat16:
      return scan_tile<FloatProducts, DType::kFloat16>(d, tile, queries, units, early, late, emit, context);
    case DType::kBFloat16:
      return scan_tile<FloatProducts, DType::kBFloat16>(d, tile, queries, units, early, late, emit, context);
    case DType::kInt8:
      return scan_tile<Int8Products, DType::kInt8>(d, tile, queries, units, early, late, emit, context);
  }
}

// Bit i: ids[i] > id, for kRowsAtOnce ids.
uint64_t ids_behind(const int64_t* ids, int64_t id) {
  uint64_t behind = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kRowsAtOnce; i += 8) {
    const auto mask = _mm512_cmpgt_epi64_mask(_mm512_loadu_si512(ids + i), _mm512_set1_epi64(id));
    behind |= static_cast<uint64_t>(mask) << i;
  }
#elif defined(__AVX2__)
  for (int i = 0; i < kRowsAtOnce; i += 4) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + i));
    const __m256i larger = _mm256_cmpgt_epi64(four, _mm256_set1_epi64x(id));
    behind |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_castsi256_pd(larger))) << i;
  }
#else
  for (int i = 0; i < kRowsAtOnce; ++i) behind |= uint64_t{ids[i] > id} << i;
#endif
  return behind;
}

uint64_t wanted(const float* scores, const MipsTopkWanted& wanted) {
  const Floats least = broadcast<Floats>(wanted.least), radius = broadcast<Floats>(wanted.radius);
  uint64_t reached = 0, tied = 0;
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    Floats score = load<Floats>(scores + v * kLanes);
    if (wanted.row_error != nullptr) score = multiply_add(radius, load<Floats>(wanted.row_error + v * kLanes), score);
    reached |= at_least(score, least) << v * kLanes;
    if (wanted.ids != nullptr) tied |= (at_least(score, least) & at_least(least, score)) << v * kLanes;
  }
  return tied == 0 ? reached : reached & ~(tied & ids_behind(wanted.ids, wanted.id));
}

}  // namespace

extern const MipsTopkKernel mips_topk_kernel;
const MipsTopkKernel mips_topk_kernel = {panel_bytes, queries_bytes, pack_queries, scan_tile, wanted};

}  // namespace GRANK_ISA
}  // namespace grank
