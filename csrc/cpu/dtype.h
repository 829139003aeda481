// The element types of tables and tensors, numbered as grank_kernels/backends/cpu.py passes them.
#pragma once

namespace grank {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };

constexpr int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2; }

}  // namespace grank
