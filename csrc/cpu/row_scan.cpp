#include "row_scan.h"

namespace grank {

Sample sample_of(int64_t num_rows, int64_t num_queries, int64_t k) {
  // A sampled row costs one cache miss for all queries together; an emitted candidate costs about the same per query.
  int64_t rows = num_queries < 8 ? 1024 : 16384;
  if (rows > num_rows / 16) {  // a short table: sampling pays only if k log(num_rows / k) candidates cost more
    if (k < 64) return {};
    rows = num_rows / 16;
  }
  const double expected = static_cast<double>(k) * rows / num_rows;
  const auto rank = static_cast<int64_t>(std::ceil(expected + 4.3 * std::sqrt(expected) + 3));
  if (rank > rows / 4) return {};
  return {rows, rank};
}

std::vector<uint32_t> sampled_rows(int64_t num_rows, int64_t count) {
  std::vector<uint32_t> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = num_rows * i / count, end = num_rows * (i + 1) / count;  // num_rows < 2^32, count < 2^27
    const uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    rows[static_cast<size_t>(i)] = static_cast<uint32_t>(begin + static_cast<int64_t>((mixed >> 32) % (end - begin)));
  }
  return rows;
}

float quantise(const float* q, int64_t d, int8_t* q8) {
  float largest = 0;
  for (int64_t j = 0; j < d; ++j) {
    const float a = std::fabs(q[j]);
    if (!(a <= largest)) largest = a;
    if (std::isnan(largest)) break;
  }
  const float scale = largest / 127.0f;
  constexpr float kRound = 0x1.8p23f;  // rounds to integers, half to even, without a call of the C library per number
  for (int64_t j = 0; j < d; ++j) {
    const float x = q[j] / scale + kRound - kRound;
    // With a scale of 0, infinity or NaN the quotient may be NaN: q8 = 0, and the score is 0 or NaN by the scale.
    q8[j] = std::isnan(x) ? 0 : static_cast<int8_t>(std::clamp(x, -127.0f, 127.0f));
  }
  return scale;
}

int64_t list_allowed(const bool* allow, int64_t begin, int64_t end, uint32_t* list) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(allow);  // a bool tensor may view bytes other than 0 and 1
  int64_t n = 0;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = std::min<int64_t>(i + 32, end);
    uint64_t words[4] = {1};
    if (stop - i == 32) __builtin_memcpy(words, bytes + i, 32);
    if ((words[0] | words[1] | words[2] | words[3]) != 0) {
      for (int64_t row = i; row < stop; ++row) {
        list[n] = static_cast<uint32_t>(row);
        n += bytes[row] != 0;
      }
    }
    i = stop;
  }
  return n;
}

MipsTopkProblem some_queries(const MipsTopkProblem& problem, int64_t first, int64_t count) {
  MipsTopkProblem some = problem;
  some.num_queries = count;
  some.floors = nullptr;
  some.queries += first * problem.d;
  if (problem.places != nullptr && count > 1) {
    some.places += first;
    return some;
  }
  const int64_t place = problem.place(first);
  some.places = nullptr;
  some.values += place * problem.k;
  some.positions += place * problem.k;
  if (some.exclude_offsets != nullptr) some.exclude_offsets += place;
  if (some.allow != nullptr) some.allow += place * problem.allow_stride;
  if (count == 1) some.allow_stride = 0;  // one query: a shared mask
  return some;
}

}  // namespace grank
