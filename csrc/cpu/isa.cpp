#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace grank {

// GRANK_ISAS lists X(isa, wide): `wide` is the instruction set whose kernels serve dtypes other than bfloat16, usually
// `isa` itself.
#define X(isa, wide)                                                                         \
  namespace isa {                                                                            \
  extern const MipsTopkKernel mips_topk_kernel;                                              \
  extern const ScoreCandidatesKernel score_candidates_kernel;                                \
  extern const AttentionPass attention_forward, attention_grad_queries, attention_grad_keys; \
  extern const CorpusPass corpus_forward, corpus_backward;                                   \
  }
GRANK_ISAS
#undef X

namespace {

#if defined(__x86_64__)
// AMX needs the processor's support, tile state enabled in XCR0, and a permission that Linux grants per process on
// request (threads inherit it). Not every compiler's __builtin_cpu_supports knows AMX.
bool may_use_amx() {
#if defined(GRANK_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  constexpr unsigned kTileInt8Bf16 = 3u << 24 | 1u << 22;  // in EDX of CPUID leaf 7
  constexpr unsigned kTileStates = 3u << 17;               // in XCR0, readable on every processor with AVX-512
  constexpr long kRequestPermission = 0x1023;              // ARCH_REQ_XCOMP_PERM, missing from older systems' headers
  constexpr long kTileData = 18;                           // XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTileInt8Bf16) != kTileInt8Bf16) return false;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileStates) == kTileStates && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also checks that the operating system saves the wide registers (XCR0).
bool runs_here(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // those with both have F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == "avx512vnni") return avx512vnni;
  if (isa == "avx512bf16") return avx512vnni && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx") return avx512vnni && may_use_amx();
#endif
  return false;
}

}  // namespace

const std::vector<Isa>& isas() {
  // Never destroyed: daemon threads may search during process exit.
  static const auto& all = *new std::vector<Isa>{
#define RANKER(isa)                                                                      \
  {&isa::score_candidates_kernel, &isa::attention_forward, &isa::attention_grad_queries, \
   &isa::attention_grad_keys,     &isa::corpus_forward,    &isa::corpus_backward}
#define X(isa, wide) {#isa, runs_here(#isa), &wide::mips_topk_kernel, RANKER(wide), RANKER(isa)},
      GRANK_ISAS
#undef X
#undef RANKER
  };
  return all;
}

namespace {

const Isa& find_isa(const std::string& argument, const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (isa.name == name && isa.runs_here) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name) + (isa.runs_here ? "" : " (not on this processor)");
  }
  throw std::invalid_argument(argument + " must be one of " + known + ", got '" + name + "'");
}

const Isa& first_choice() {
  if (const char* name = std::getenv("GRANK_CPU_ISA"); name != nullptr && *name != '\0') {
    return find_isa("GRANK_CPU_ISA", name);
  }
  const Isa* best = &isas().front();
  for (const Isa& isa : isas()) {
    if (isa.runs_here) best = &isa;
  }
  return *best;
}

std::atomic<const Isa*>& active() {
  static std::atomic<const Isa*> isa{&first_choice()};
  return isa;
}

}  // namespace

const Isa& active_isa() { return *active(); }

void set_active_isa(const std::string& name) { active() = &find_isa("isa", name); }

}  // namespace grank
