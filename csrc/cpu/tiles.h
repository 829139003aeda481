// Tiles: the product of tile_product.h for the instruction set of this compilation.
#pragma once

#include "tile_product_amx.h"
#include "tile_product_floats.h"
#include "tile_product_pairs.h"

namespace grank {
namespace GRANK_ISA {

#if GRANK_AMX
using Tiles = AmxTiles;
#elif defined(__AVX512BF16__)
using Tiles = PairTiles;
#else
using Tiles = FloatTiles;
#endif

}  // namespace GRANK_ISA
}  // namespace grank
