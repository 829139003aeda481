#include "build_info.h"

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>

#ifndef GRANK_CUDA_ARCHS
#error "GRANK_CUDA_ARCHS must be the list of CUDA architectures, a string such as \"80-real,90\""
#endif

namespace grank::cuda {

int runtime_version() { return CUDART_VERSION; }

std::vector<std::string> architectures() {
  // CMake's notation with commas: "80-real" is machine code, "80-virtual" is PTX, "80" is both.
  std::vector<std::string> names;
  std::istringstream list(GRANK_CUDA_ARCHS);
  for (std::string entry; std::getline(list, entry, ',');) {
    const size_t dash = entry.find('-');
    const std::string number = entry.substr(0, dash);
    const std::string kind = dash == std::string::npos ? "" : entry.substr(dash + 1);
    if (kind != "virtual") names.push_back("sm_" + number);
    if (kind != "real") names.push_back("compute_" + number);
  }
  return names;
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  switch (error) {
    case cudaSuccess:
      return count;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:  // also returned if no driver is installed
    case cudaErrorStubLibrary:
      cudaGetLastError();  // clears the error, which the next call would report otherwise
      return 0;
    default:
      cudaGetLastError();
      throw std::runtime_error(std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error));
  }
}

}  // namespace grank::cuda
