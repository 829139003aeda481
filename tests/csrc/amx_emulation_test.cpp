// The flavour `amx` on emulated tile registers, under AddressSanitizer and UBSan: the emulation itself (its arithmetic,
// and that it stops at what would be a fault), then int8 searches against the other instruction sets, bit for bit.
#include "amx_emulation.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mips_topk.h"

namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAIL %s\n", what.c_str());
  ++failures;
}

// ---- the emulation ----

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

Config config_of(int c_rows, int units, int columns) {  // tiles 0, 1, 2: C, A, B
  Config config;
  const int shapes[3][2] = {{c_rows, 4 * columns}, {c_rows, 4 * units}, {units, 4 * columns}};
  for (int i = 0; i < 3; ++i) {
    config.rows[i] = static_cast<uint8_t>(shapes[i][0]);
    config.row_bytes[i] = static_cast<uint16_t>(shapes[i][1]);
  }
  return config;
}

void multiplies() {
  std::mt19937 random(1);
  for (const int m : {1, 3, 16}) {
    for (const int units : {1, 5, 16}) {
      for (const int n : {1, 7, 16}) {
        std::vector<int8_t> a(static_cast<size_t>(m * units * 4)), b(static_cast<size_t>(units * n * 4));
        for (int8_t& x : a) x = static_cast<int8_t>(random());
        for (int8_t& x : b) x = static_cast<int8_t>(random());
        a[0] = b[0] = -128;
        std::vector<int32_t> c(static_cast<size_t>(m * n)), want(c);
        const Config config = config_of(m, units, n);
        _tile_loadconfig(&config);
        _tile_zero(0);
        _tile_loadd(1, a.data(), 4 * units);
        _tile_loadd(2, b.data(), 4 * n);
        _tile_dpbssd(0, 1, 2);
        _tile_dpbssd(0, 1, 2);
        _tile_stored(0, c.data(), 4 * n);
        _tile_release();
        for (int i = 0; i < m; ++i) {
          for (int j = 0; j < n; ++j) {
            for (int k = 0; k < 4 * units; ++k) {
              want[i * n + j] += 2 * a[i * 4 * units + k] * b[(k / 4 * n + j) * 4 + k % 4];
            }
          }
        }
        check(c == want, "tdpbssd of " + std::to_string(m) + " x " + std::to_string(units) + " x " + std::to_string(n));
      }
    }
  }
}

// Whether `misuse` ends in an abort, with the emulation's message.
template <typename F>
void aborts(const char* message, F misuse) {
  int ends[2];
  if (pipe(ends) != 0) return check(false, "pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    misuse();
    _exit(0);
  }
  close(ends[1]);
  char said[256] = {};
  const ssize_t length = read(ends[0], said, sizeof said - 1);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  check(length > 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && std::strstr(said, message) != nullptr,
        std::string("a misuse should have ended in '") + message + "', said: " + said);
}

void stops_at_faults() {
  char memory[1024] = {};
  const auto loads = [](auto change) {
    return [change] {
      Config config = config_of(16, 16, 16);
      change(config);
      _tile_loadconfig(&config);
    };
  };
  const auto multiplies = [&](auto change) {
    return [=] {
      loads(change)();
      _tile_dpbssd(0, 1, 2);
    };
  };
  aborts("not configured", [] { _tile_zero(0); });
  aborts("not configured", [&] { _tile_loadd(0, memory, 64); });
  aborts("not configured", [&] { _tile_stored(0, memory, 64); });
  aborts("not configured", [] { _tile_dpbssd(0, 1, 2); });
  aborts("not configured", [&] {
    loads([](Config&) {})();
    _tile_release();
    _tile_loadd(0, memory, 64);
  });
  aborts("no rows", [&] {
    loads([](Config&) {})();
    _tile_zero(3);
  });
  aborts("palette", loads([](Config& c) { c.palette = 2; }));
  aborts("start_row", loads([](Config& c) { c.start_row = 1; }));
  aborts("reserved", loads([](Config& c) { c.reserved[13] = 1; }));
  aborts("reserved", loads([](Config& c) { c.row_bytes[8] = 64; }));
  aborts("reserved", loads([](Config& c) { c.rows[8] = 16; }));
  aborts("64 bytes", loads([](Config& c) { c.row_bytes[0] = 65; }));
  aborts("16 rows", loads([](Config& c) { c.rows[0] = 17; }));
  aborts("rows without", loads([](Config& c) { c.row_bytes[0] = 0; }));
  aborts("differ in rows", multiplies([](Config& c) { c.rows[0] = 15; }));
  aborts("differ in bytes", multiplies([](Config& c) { c.row_bytes[0] = 60; }));
  aborts("A's units", multiplies([](Config& c) { c.row_bytes[1] = 60; }));
  aborts("multiple of 4", multiplies([](Config& c) { c.row_bytes[1] = 63; }));
}

// ---- the kernel ----

struct Result {
  std::vector<float> values;
  std::vector<int64_t> positions;
  bool operator==(const Result& other) const {
    return std::memcmp(values.data(), other.values.data(), values.size() * sizeof(float)) == 0 &&
           positions == other.positions;
  }
};

template <typename T>
std::unique_ptr<T[]> exact(int64_t count) {  // so that AddressSanitizer sees every step outside
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

// int8 searches of one shape under all instruction sets.
void search(int64_t B, int64_t N, int64_t d, int64_t k, int threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + N * 1009 + d));
  const auto queries = exact<float>(B * d), scale = exact<float>(N);
  const auto rows = exact<int8_t>(N * d);
  for (int64_t i = 0; i < B * d; ++i) queries[i] = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 999;
  for (int64_t i = 0; i < N * d; ++i) rows[i] = static_cast<int8_t>(random());  // -128 is as good as any
  for (int64_t i = 0; i < N; ++i) scale[i] = static_cast<float>(random() % 1000) / 999;
  Result want;
  for (const grank::Isa& isa : grank::isas()) {
    if (!isa.runs_here) continue;
    Result got{std::vector<float>(static_cast<size_t>(B * k)), std::vector<int64_t>(static_cast<size_t>(B * k))};
    grank::MipsTopkProblem p{};
    p.queries = queries.get(), p.num_queries = B;
    p.rows = rows.get(), p.dtype = grank::DType::kInt8, p.num_rows = N, p.d = d, p.row_stride = d;
    p.row_scale = scale.get();
    p.k = k, p.threads = threads;
    p.values = got.values.data(), p.positions = got.positions.data();
    const int64_t before = amx_emulation::products;
    grank::mips_topk(p, isa);
    const std::string name = std::string(isa.name) + " B=" + std::to_string(B) + " N=" + std::to_string(N) +
                             " d=" + std::to_string(d) + " k=" + std::to_string(k);
    check(amx_emulation::configured_threads == 0, name + " left tile registers in use");
    const bool used = amx_emulation::products > before;
    const bool due = std::strcmp(isa.name, "amx") == 0 && B > 1;  // one query is multiplied as its rows are transposed
    check(used == due, name + (used ? " used tile registers" : " used none"));
    if (want.values.empty()) want = got;
    check(got == want, name + " differs from " + grank::isas().front().name);
  }
}

}  // namespace

int main() {
  multiplies();
  stops_at_faults();
  const bool runs = grank::isas().back().runs_here;
  if (!runs) std::printf("amx_emulation: no AVX-512 VNNI here, so the kernel is left out\n");
  int64_t searches = 0;
  for (const int64_t d : {1, 3, 4, 31, 63, 64, 65, 100, 127, 128, 129, 200, 256}) {
    for (const int64_t B : {1, 5, 6, 15, 16, 17, 33, 49, 500, 541}) {  // 541: more than one step takes
      for (const int64_t N : {1, 63, 64, 65, 300, 2500}) {
        if (!runs || B * N * d > 5'000'000) continue;
        search(B, N, d, std::min<int64_t>(N, 1 + B % 10), 1 + static_cast<int>(N % 2));
        ++searches;
      }
    }
  }
  if (runs) search(20, 40000, 33, 10, 2);  // with a sampled threshold
  std::printf("amx_emulation: %lld searches, %d failures\n", static_cast<long long>(searches), failures);
  return failures > 0;
}
