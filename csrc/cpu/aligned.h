// Uninitialised scratch memory, 64-byte aligned, one block per thread.
#pragma once

#include <cstdint>
#include <memory>

namespace grank {

class AlignedMemory {
 public:
  explicit AlignedMemory(int64_t bytes, int pieces = 1)
      : stride_((bytes + 63) / 64 * 64), memory_(new char[static_cast<size_t>(stride_ * pieces + 63)]) {}

  void* of(int piece) const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<void*>((address + 63) / 64 * 64 + static_cast<uintptr_t>(piece * stride_));
  }

 private:
  int64_t stride_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace grank
