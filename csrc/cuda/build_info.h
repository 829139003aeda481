// What the CUDA module was compiled for, and the devices it finds. Host code; needs neither a GPU nor a driver.
#pragma once

#include <string>
#include <vector>

namespace grank::cuda {

// CUDART_VERSION of the runtime that is linked in: 13000 for CUDA 13.0.
int runtime_version();

// One entry for every kind of code in the module: "sm_80" for machine code, "compute_90" for PTX.
std::vector<std::string> architectures();

// Initialises the driver. 0 where there is no device or no driver that can serve this runtime;
// std::runtime_error with CUDA's own words for every other failure.
int device_count();

}  // namespace grank::cuda
