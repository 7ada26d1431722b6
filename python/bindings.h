// One function for each op, defined in python/<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace vareid {

void bind_angular_center(pybind11::module_& m);
void bind_k_reciprocal(pybind11::module_& m);
void bind_nearest_neighbors(pybind11::module_& m);
void bind_pairwise_distance(pybind11::module_& m);
void bind_viewpoint_aware_cross_entropy(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_linear_viewpoint_aware_cross_entropy(pybind11::module_& m);
void bind_ranking(pybind11::module_& m);
void bind_verification(pybind11::module_& m);

}  // namespace vareid
