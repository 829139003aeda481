// The kind of product that the flavour this is compiled for uses.
#pragma once

#include "tile_product.h"
#include "tile_product_amx.h"
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
