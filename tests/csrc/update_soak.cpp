// Searches while a table is updated, under ThreadSanitizer: what grank_kernels/table/versions.py relies on. A version
// is a length of the log; the writer writes behind it while searches of it run. So a search must read no row, id or
// mark at or behind its length, and nothing of a search may be shared with another. A search must also see one version
// alone: every row holds the number of the update that wrote it.
//
//   update_soak                  exit 0: no race, no mixture
//   update_soak --planted-race   the writer also writes where versions read: ThreadSanitizer must report it
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mips_topk.h"

namespace {

constexpr int64_t kRows = 777, kWidth = 7, kUpdates = 300, kReaders = 3, kThreads = 2;
constexpr int64_t kCapacity = 5 * kRows;

struct Log {
  std::vector<float> rows = std::vector<float>(kCapacity * kWidth);
  std::vector<int64_t> ids = std::vector<int64_t>(kCapacity);
  std::vector<std::atomic<int32_t>> died = std::vector<std::atomic<int32_t>>(kCapacity);  // 0: never
};

struct Version {
  std::shared_ptr<Log> log;
  int64_t size;
  int32_t update;
};

std::mutex mutex;  // as the interpreter's lock: it publishes a version, no search holds it
Version newest;
std::atomic<int> mixtures{0}, searches{0};

Version current() {
  std::lock_guard<std::mutex> lock(mutex);
  return newest;
}

// Replaces all rows: in the log while there is room, then in a new one.
void update(int32_t number, bool planted_race) {
  Version next = current();
  const int64_t first = next.log != nullptr && next.size + kRows <= kCapacity ? next.size : 0;
  if (first == 0) next.log = std::make_shared<Log>();
  for (int64_t i = 0; i < kRows; ++i) {
    std::fill_n(next.log->rows.data() + (first + i) * kWidth, kWidth, static_cast<float>(number));
    next.log->ids[first + i] = (i * 31 + number) % kRows;
  }
  for (int64_t i = first - kRows; first > 0 && i < first; ++i) next.log->died[i].store(number);
  if (planted_race && first > 0) next.log->rows[(first - 1) * kWidth] = static_cast<float>(number);
  next.size = first + kRows;
  next.update = number;
  std::lock_guard<std::mutex> lock(mutex);
  newest = next;
}

void search() {
  const Version version = current();
  std::unique_ptr<bool[]> alive(new bool[version.size]);
  for (int64_t i = 0; i < version.size; ++i) {
    const int32_t died = version.log->died[i].load();
    alive[i] = died == 0 || died > version.update;
  }
  constexpr int64_t kQueries = 2, kBest = kRows + 3;
  const std::vector<float> queries(kQueries * kWidth, 1.0f);
  std::vector<float> values(kQueries * kBest);
  std::vector<int64_t> positions(kQueries * kBest);
  grank::MipsTopkProblem p{};
  p.queries = queries.data();
  p.num_queries = kQueries;
  p.rows = version.log->rows.data();
  p.dtype = grank::DType::kFloat32;
  p.num_rows = version.size;
  p.d = kWidth;
  p.row_stride = kWidth * static_cast<int64_t>(sizeof(float));
  p.ids = version.log->ids.data();
  p.allow = alive.get();
  p.k = kBest;
  p.threads = kThreads;
  p.values = values.data();
  p.positions = positions.data();
  grank::mips_topk(p, grank::active_isa());
  for (int64_t i = 0; i < kQueries * kBest; ++i) {
    const bool found = i % kBest < kRows;
    if (found ? values[i] != static_cast<float>(version.update * kWidth) : positions[i] != -1) ++mixtures;
  }
  ++searches;
}

}  // namespace

int main(int argc, char** argv) {
  const bool planted_race = argc == 2 && std::strcmp(argv[1], "--planted-race") == 0;
  update(1, false);
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int64_t i = 0; i < kReaders; ++i) {
    readers.emplace_back([&] {
      do search();
      while (!stop);
    });
  }
  for (int32_t number = 2; number <= kUpdates; ++number) {
    update(number, planted_race);
    while (searches < number) std::this_thread::yield();  // both go on at about one pace
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  std::printf("update_soak: %d updates, %d searches, %d mixtures\n", static_cast<int>(kUpdates), searches.load(),
              mixtures.load());
  return mixtures.load() > 0;
}
