// The compiled module: version handshake, device probe, and the list of ops.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "device.h"

namespace py = pybind11;

PYBIND11_MODULE(_vareid_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of vareid_ext";
  m.attr("version") = VAREID_VERSION;
  m.attr("interface") = VAREID_NATIVE_INTERFACE;
#ifdef VAREID_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_architectures") = VAREID_CUDA_ARCHITECTURES;
  m.def("cuda_unusable_reason", &vareid::cuda_unusable_reason, py::arg("device"),
        "Why the CUDA kernels cannot run on a device, or an empty string");
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_architectures") = "";
#endif
  vareid::bind_angular_center(m);
  vareid::bind_k_reciprocal(m);
  vareid::bind_memory(m);
  vareid::bind_nearest_neighbors(m);
  vareid::bind_pairwise_distance(m);
  vareid::bind_viewpoint_aware_cross_entropy(m);
  vareid::bind_linear_viewpoint_aware_cross_entropy(m);
  vareid::bind_ranking(m);
  vareid::bind_verification(m);
}
