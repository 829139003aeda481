#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace grank {

#define X(isa)                                          \
  namespace isa {                                       \
  extern const MipsTopkKernel mips_topk_kernel;         \
  }
GRANK_ISAS
#undef X

namespace {

// GCC's and clang's __builtin_cpu_supports also ask the operating system whether it saves the wide registers.
bool runs_here(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // those with both have F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512vnni") return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

const Isa& choose() {
  if (const char* name = std::getenv("GRANK_CPU_ISA"); name != nullptr && *name != '\0') return find_isa(name);
  const Isa* best = &isas().front();
  for (const Isa& isa : isas()) {
    if (isa.runs_here) best = &isa;
  }
  return *best;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all{
#define X(isa) {#isa, runs_here(#isa), &isa::mips_topk_kernel},
      GRANK_ISAS
#undef X
  };
  return all;
}

const Isa& find_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (isa.name == name && isa.runs_here) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name) + (isa.runs_here ? "" : " (not on this processor)");
  }
  throw std::invalid_argument("GRANK_CPU_ISA is '" + name + "'; it takes one of: " + known);
}

const Isa& active_isa() {
  static const Isa& active = choose();
  return active;
}

}  // namespace grank
