// A coverage-guided fuzzer for compilers without one: what GCC compiles with -fsanitize-coverage=trace-pc calls
// __sanitizer_cov_trace_pc at every branch. Inputs that take a branch, or take it twice as often, as none before are
// kept, and new ones are made by changing those. This file must be compiled without that flag.
//
//   fuzzer RUNS [SEED]    exit 0: nothing was found; otherwise the input is written to crash-SEED
//   fuzzer FILE           runs one input
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kBranches = 1 << 16;
constexpr size_t kLongest = 4096;

std::atomic<uint32_t> taken[kBranches];  // in the current run, by a hash of the branch and the one before
std::atomic<uint32_t> visited[kBranches], num_visited;  // those that are not 0
uint32_t most[kBranches];                               // in any run, as powers of two
thread_local uintptr_t before;

Input current;
std::string crash_file;

void save_current(int signal) {
  std::ofstream(crash_file, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
  std::printf("found: %s, %zu bytes\n", crash_file.c_str(), current.size());
  std::fflush(stdout);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

Input changed(const std::vector<Input>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  Input input = corpus[below(corpus.size())];
  for (size_t changes = 1 + below(6); changes > 0; --changes) {
    const size_t at = below(below(input.size() + 1) + 1);  // rather early: there an input says what kind of case it is
    const auto place = input.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(6)) {
      case 0:
        if (at < input.size()) *place ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (at < input.size()) *place = static_cast<uint8_t>(random());
        break;
      case 2:
        if (at < input.size()) *place = static_cast<uint8_t>(*place + below(17) - 8);
        break;
      case 3:
        input.insert(place, 1 + below(16), static_cast<uint8_t>(random()));
        break;
      case 4:
        input.erase(place, place + static_cast<std::ptrdiff_t>(std::min(below(16), input.size() - at)));
        break;
      default: {  // the rest of another input
        const Input& other = corpus[below(corpus.size())];
        input.resize(at);
        if (at < other.size()) input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(at), other.end());
      }
    }
  }
  if (input.size() > kLongest) input.resize(kLongest);
  return input;
}

// Runs the current input; whether it went where none has been.
bool is_new() {
  num_visited = 0;
  before = 0;
  LLVMFuzzerTestOneInput(current.data(), current.size());
  bool found = false;
  for (uint32_t i = 0; i < num_visited; ++i) {
    const uint32_t branch = visited[i];
    const uint32_t power = 32 - static_cast<uint32_t>(__builtin_clz(taken[branch].exchange(0)));
    found |= power > most[branch];
    most[branch] = std::max(most[branch], power);
  }
  return found;
}

}  // namespace

// The sanitizers end in a signal, too, so that the input is written.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

extern "C" void __sanitizer_cov_trace_pc() {
  const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const auto branch = static_cast<uint32_t>((here ^ here >> 16 ^ before) % kBranches);
  if (taken[branch].fetch_add(1, std::memory_order_relaxed) == 0) visited[num_visited++] = branch;
  before = here << 1;
}

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: %s RUNS [SEED] | FILE\n", argv[0]), 2;
  if (std::ifstream file(argv[1], std::ios::binary); file) {
    current.assign(std::istreambuf_iterator<char>(file), {});
    return LLVMFuzzerTestOneInput(current.data(), current.size());
  }
  const long runs = std::atol(argv[1]);
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  crash_file = "crash-" + std::to_string(seed);
  for (const int signal : {SIGABRT, SIGSEGV, SIGFPE, SIGILL, SIGBUS}) std::signal(signal, save_current);
  std::mt19937_64 random(seed);
  std::vector<Input> corpus = {{}};
  for (long run = 0; run < runs; ++run) {
    current = changed(corpus, random);
    if (is_new()) corpus.push_back(current);
  }
  const auto branches = std::count_if(std::begin(most), std::end(most), [](uint32_t n) { return n > 0; });
  std::printf("%ld runs, %zu inputs kept, %ld branches taken, nothing found\n", runs, corpus.size(),
              static_cast<long>(branches));
  return runs > 0 ? 0 : 2;
}
