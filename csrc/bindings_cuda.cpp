// The Python module grank_kernels._cuda. Importing it touches neither the driver nor a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA backend of grank_kernels: raw addresses and a stream handle in, nothing else.";
  m.def("cuda_runtime_version", &grank::cuda::runtime_version,
        "Version of the CUDA runtime that is linked in, as CUDA writes it: 13000 for 13.0.");
  m.def("architectures", &grank::cuda::architectures,
        "What the kernels were compiled for: 'sm_80' is machine code, 'compute_90' is PTX.");
  m.def("device_count", &grank::cuda::device_count, py::call_guard<py::gil_scoped_release>(),
        "Number of CUDA devices; 0 without a driver. The one function here that initialises CUDA.");
}
