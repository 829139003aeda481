// What a fuzzer runs: the bytes of an input choose a search, its numbers and its filters (mips_topk_case.h). Linked
// with coverage_fuzzer.cpp, or by a compiler that has it with -fsanitize=fuzzer.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "mips_topk_case.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Random random(data, size);
  const Shape shape = draw(random, 20000);
  Case(shape, size, random).run();
  if (failures > 0) std::abort();
  return 0;
}
