// Maps run-time dtypes and widths to template arguments.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "primitives.cuh"

namespace grank::cuda {

// Calls f(float16()) or f(bfloat16()).
template <class Function>
void with_element(bool bfloat, Function f) {
  if (bfloat) {
    f(bfloat16());
  } else {
    f(float16());
  }
}

// Calls f with the width as an integral_constant.
template <class Function>
void with_width(const char* name, int width, Function f) {
  switch (width) {
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(width) + "; it takes 16, 32, 64 or 128");
  }
}

}  // namespace grank::cuda
