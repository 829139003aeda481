// Target architectures of the CUDA module, and its devices. Host code that needs neither a GPU nor a driver.
#pragma once

#include <string>
#include <vector>

namespace grank::cuda {

// CUDART_VERSION of the linked runtime: 13000 for CUDA 13.0.
int runtime_version();

// One entry per architecture in the module: "sm_80" for machine code, "compute_90" for PTX.
std::vector<std::string> architectures();

// Initialises the driver. Returns 0 without a device, or without a driver that supports this runtime; other failures
// throw std::runtime_error with CUDA's message.
int device_count();

}  // namespace grank::cuda
