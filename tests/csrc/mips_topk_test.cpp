// mips_topk and mips_topk_certified over many cases (mips_topk_case.h), built under AddressSanitizer and UBSan.
//
//   mips_topk_test                 runs all cases, exit 1 if one fails
//   mips_topk_test --concurrent    those that run at once, for ThreadSanitizer
//   mips_topk_test --list-isa      prints the instruction sets of this processor, one a line; GRANK_CPU_ISA chooses
#include "mips_topk_case.h"

#include <new>
#include <thread>

#include "cpu/threads.h"

namespace {

void run(const Shape& shape, uint64_t seed) { Case(shape, seed).run(); }

// ---- the cases ----

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

// Every width up to two segments: all ways a row can end, each behind the end of its allocation.
void widths() {
  for (const DType dtype : kDTypes) {
    for (int64_t d = 0; d <= 270; d += d < 70 ? 1 : 7) {
      const auto seed = static_cast<uint64_t>(1000 + d);
      run({dtype, Fill::kNumbers, 1 + d % 8, 67, d, 5}, seed);
      run({dtype, Fill::kIntegers, 1 + d % 3, 64, d, 70, /*gap=*/1 + d % 9}, seed);
    }
  }
}

void drawn(uint64_t first_seed, int count, int64_t work) {
  for (int i = 0; i < count; ++i) {
    Random random(first_seed + static_cast<uint64_t>(i));
    run(draw(random, work), first_seed + static_cast<uint64_t>(i));
  }
}

// Tables so long that the threshold comes from a sample, with few and with many queries, and several threads.
void sampled() {
  for (const DType dtype : kDTypes) {
    for (const int threads : {1, 4}) {
      run({dtype, Fill::kNumbers, 3, 33000, 6, 200, 0, false, false, 0, 0.5, threads}, 1);
      run({dtype, Fill::kNumbers, 7, 20000, 5, 1000, 2, true, true, 1, 0.3, threads}, 2);
      run({dtype, Fill::kNumbers, 2, 20000, 5, 50, 0, false, false, 2, 0.02, threads}, 3);  // few rows for every query
      run({dtype, Fill::kNumbers, 5, 20000, 5, 50, 1, true, true, 3, 0.03, threads}, 9);    // and about as many as that
      run({dtype, Fill::kIntegers, 2, 20000, 2, 500, 0, threads == 4, false, 0, 0.5, threads, 40}, 4);
    }
    run({dtype, Fill::kNumbers, 9, 270000, 2, 300, 0, false, false, 0, 0.5, 3}, 5);
    run({dtype, Fill::kNumbers, 20, 100000, 32, 40, 0, false, true, 0, 0.5, 3}, 7);
    run({dtype, Fill::kNumbers, 2, 90000, 5, 20, 3, true, false, 1, 0.01, 3}, 8);
  }
}

// The sample sees nothing but the k - 1 best rows, so its threshold is above the k-th best and the search has to begin
// again. Where the sample is taken: sampled_rows() in row_scan.cpp.
void sample_misleads() {
  for (const bool many : {false, true}) {
    const int64_t num_rows = many ? 262144 : 16384, count = many ? 16384 : 1024, k = 90;
    for (const bool ids : {false, true}) {
      const Shape shape{DType::kFloat32, Fill::kNumbers, many ? 8 : 2, num_rows, 1, k, 0, ids, ids, 0, 0.5, 3};
      Case one(shape, 6);
      for (int64_t b = 0; b < shape.num_queries; ++b) one.set_query(b, 0, b % 2 == 0 ? 1.0f : -1.0f);
      for (int64_t i = 0; i < k - 1; ++i) {
        const int64_t begin = num_rows * i / count, end = num_rows * (i + 1) / count;
        const uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
        one.set_float32(begin + static_cast<int64_t>((mixed >> 32) % static_cast<uint64_t>(end - begin)), 0, 10.0f + i);
      }
      one.run();
    }
  }
}

// Several threads search at once, each with threads of its own from the one pool.
void concurrent() {
  std::vector<std::thread> callers;
  for (uint64_t caller = 0; caller < 5; ++caller) {
    callers.emplace_back([caller] {
      drawn(50000 + 1000 * caller, 25, 100000);
      run({kDTypes[caller % 4], Fill::kNumbers, 4, 20000, 7, 100, 0, false, true, 0, 0.5, 3}, caller);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// What a step throws, on whichever thread, is the caller's, and the pool goes on.
void failing_steps() {
  for (int64_t failing = 0; failing < 64; ++failing) {
    std::atomic<int> done{0};
    bool thrown = false;
    try {
      grank::parallel_for(4, 64, [&](int64_t step, int) {
        if (step == failing) throw std::bad_alloc();
        ++done;
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    ++cases;
    failures += !thrown || done < failing;
  }
}

int list_isas() {
  for (const grank::Isa& isa : grank::isas()) {
    if (isa.runs_here) std::printf("%s\n", isa.name);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "";
  if (option == "--list-isa") return list_isas();
  if (argc > 2 || (!option.empty() && option != "--concurrent")) {
    std::fprintf(stderr, "usage: %s [--concurrent | --list-isa]\n", argv[0]);
    return 2;
  }
  if (option.empty()) {
    widths();
    drawn(10000, 500, 400000);
    sampled();
    sample_misleads();
  }
  concurrent();
  failing_steps();
  std::printf("mips_topk %s: %d cases, %d failed\n", grank::active_isa().name, cases.load(), failures.load());
  return failures.load() > 0 || cases.load() == 0;
}
