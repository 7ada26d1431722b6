#include "viewpoint_aware_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "array.h"
#include "bindings.h"
#include "soft_target.h"

namespace vareid {
namespace {

struct Batch {
  int64_t N = 0, K = 0;
  DType dtype = DType::kFloat32;
  int32_t device_type = kDeviceCpu, device_id = 0;
  CrossEntropyHead heads[2];
};

bool rows_are_dense(const Array& array) {
  if (array.contiguous) return true;
  int64_t expected = 1;
  for (int d = array.ndim - 1; d >= 1; --d) {
    if (array.shape[d] != 1 && array.strides[d] != expected) return false;
    expected *= array.shape[d];
  }
  return true;
}

// Sizes, logits, labels and statistics: what both passes need.
Batch check(const OptionalArray& identity_logits, const OptionalArray& viewpoint_logits, const Array& identity,
            const OptionalArray& viewpoint, const OptionalArray& mask, const Array& statistics) {
  if (!identity_logits && !viewpoint_logits) refuse("identity_logits", "no logits were given");
  const Array& some = identity_logits ? *identity_logits : *viewpoint_logits;
  Batch batch;
  batch.N = some.shape[0];
  batch.K = some.shape[1];
  batch.dtype = some.dtype();
  batch.device_type = some.device_type;
  batch.device_id = some.device_id;
  const auto check_here = [&](const Array& array, const char* name) {
    check_device(array, name, some.device_type, some.device_id);
  };
  check_shape(identity, "identity", {batch.N});
  check_int64(identity, "identity");
  check_contiguous(identity, "identity");
  check_here(identity, "identity");
  check_shape(statistics, "statistics", {2, kStatistics, batch.N});
  check_double(statistics, "statistics");
  check_contiguous(statistics, "statistics");
  check_here(statistics, "statistics");
  const OptionalArray* const logits[2] = {&identity_logits, &viewpoint_logits};
  const char* const names[2] = {"identity_logits", "viewpoint_logits"};
  for (int h = 0; h < 2; ++h) {
    if (!*logits[h]) continue;
    const Array& array = **logits[h];
    CrossEntropyHead& head = batch.heads[h];
    if (array.ndim != 2 + h)
      refuse(names[h], "shape " + shape_text(array) + (h ? ", expected [N, K, V]" : ", expected [N, K]"));
    head.views = h ? array.shape[2] : 1;
    if (array.shape[0] != batch.N || array.shape[1] != batch.K)
      refuse(names[h], "shape " + shape_text(array) + " does not fit");
    check_float(array, names[h]);
    check_same_dtype(array, names[h], some, names[0]);
    check_here(array, names[h]);
    if (!rows_are_dense(array)) refuse(names[h], "must have dense rows");
    head.present = true;
    head.logits = array.data;
    head.row_stride = batch.N > 1 ? array.strides[0] : batch.K * head.views;
    head.statistics = statistics.as<double>() + h * batch.N * kStatistics;
  }
  CrossEntropyHead& head = batch.heads[1];
  if (viewpoint && viewpoint->ndim == 2) {
    check_shape(*viewpoint, "viewpoint", {batch.N, head.views});
    check_double(*viewpoint, "viewpoint");
    head.distribution = viewpoint->as<double>();
  } else if (viewpoint) {
    check_shape(*viewpoint, "viewpoint", {batch.N});
    check_int64(*viewpoint, "viewpoint");
    head.viewpoint = viewpoint->as<int64_t>();
  } else if (head.present && head.views != 1) {
    refuse("viewpoint", "None was given, but there are several views");
  }
  if (viewpoint) {
    check_contiguous(*viewpoint, "viewpoint");
    check_here(*viewpoint, "viewpoint");
  }
  if (mask) {
    check_shape(*mask, "mask", {batch.K, head.views});
    if (!mask->is_bool()) refuse("mask", "must be bool");
    check_contiguous(*mask, "mask");
    check_here(*mask, "mask");
    head.mask = mask->as<uint8_t>();
  }
  return batch;
}

// The code of what is wrong with the view of a sample, as in label_error of the reference; 0 for nothing.
int view_error(const Array& viewpoint, const uint8_t* exists, int64_t V, int64_t i) {
  if (viewpoint.ndim == 1) {
    const int64_t v = viewpoint.as<int64_t>()[i];
    if (v < -1 || v >= V) return 2;
    return v < 0 || !exists || exists[v] ? 0 : 3;
  }
  const double* const weight = viewpoint.as<double>() + i * V;
  double sum = 0;
  bool excluded = false, negative = false;
  for (int64_t k = 0; k < V; ++k) {
    negative = negative || !(weight[k] >= 0);
    excluded = excluded || (weight[k] > 0 && exists && !exists[k]);
    sum += weight[k];
  }
  return negative || !(std::abs(sum - 1) <= 1e-4) ? 4 : excluded ? 3 : 0;
}

// label_error of the reference, for arrays on the CPU: (code, row), (0, 0) where nothing is wrong.
std::pair<int, int64_t> label_error(const Array& identity, const OptionalArray& viewpoint, const OptionalArray& mask,
                                    int64_t K, int64_t V) {
  const int64_t N = identity.shape[0];
  check_int64(identity, "identity");
  check_contiguous(identity, "identity");
  check_device(identity, "identity", kDeviceCpu, 0);
  if (viewpoint) {
    if (viewpoint->ndim == 2) {
      check_shape(*viewpoint, "viewpoint", {N, V});
      check_double(*viewpoint, "viewpoint");
    } else {
      check_shape(*viewpoint, "viewpoint", {N});
      check_int64(*viewpoint, "viewpoint");
    }
    check_contiguous(*viewpoint, "viewpoint");
    check_device(*viewpoint, "viewpoint", kDeviceCpu, 0);
  }
  if (mask) {
    check_shape(*mask, "mask", {K, V});
    if (!mask->is_bool()) refuse("mask", "must be bool");
    check_contiguous(*mask, "mask");
    check_device(*mask, "mask", kDeviceCpu, 0);
  }
  const int64_t* const labels = identity.as<int64_t>();
  for (int64_t i = 0; i < N; ++i)
    if (labels[i] < 0 || labels[i] >= K) return {1, i};
  const uint8_t* const exists = mask ? mask->as<uint8_t>() : nullptr;
  for (int64_t j = 0; exists && j < K; ++j)
    if (std::none_of(exists + j * V, exists + (j + 1) * V, [](uint8_t view) { return view != 0; })) return {5, j};
  for (int64_t i = 0; viewpoint && i < N; ++i)
    if (const int code = view_error(*viewpoint, exists ? exists + labels[i] * V : nullptr, V, i)) return {code, i};
  return {0, 0};
}

Reduction check_reduction(int reduction) {
  if (reduction < 0 || reduction > 2) refuse("reduction", "must be 0 (mean), 1 (sum) or 2 (none)");
  return static_cast<Reduction>(reduction);
}

// A loss or an upstream gradient: a scalar, or one for each sample.
void* check_losses(const Array& array, const char* name, const Batch& batch, const Array& some, Reduction reduction) {
  if (reduction == Reduction::kNone)
    check_shape(array, name, {batch.N});
  else
    check_shape(array, name, {});
  check_accumulator(array, name, some);
  check_contiguous(array, name);
  check_device(array, name, batch.device_type, batch.device_id);
  return array.data;
}

int64_t workspace_bytes(int64_t N, int64_t K, int64_t V, bool has_identity, bool has_viewpoint, bool cuda) {
  const int64_t views[2] = {has_identity ? 1 : 0, has_viewpoint ? V : 0};
  if (!cuda) return viewpoint_aware_cross_entropy_workspace_bytes_cpu(N, K, views);
#ifdef VAREID_WITH_CUDA
  return viewpoint_aware_cross_entropy_workspace_bytes_cuda(N, K, views);
#else
  return 0;
#endif
}

void forward(const OptionalArray& identity_logits, const OptionalArray& viewpoint_logits, const Array& identity,
             const OptionalArray& viewpoint, const OptionalArray& mask, const Array& identity_loss,
             const Array& viewpoint_loss, const Array& statistics, bool adaptive, double alpha, double epsilon,
             int reduction_code, const OptionalArray& label_error, const Array& workspace, const Place& place) {
  Batch batch = check(identity_logits, viewpoint_logits, identity, viewpoint, mask, statistics);
  const Array& some = identity_logits ? *identity_logits : *viewpoint_logits;
  const Reduction reduction = check_reduction(reduction_code);
  if (identity_logits) batch.heads[0].loss = check_losses(identity_loss, "identity_loss", batch, some, reduction);
  if (viewpoint_logits) batch.heads[1].loss = check_losses(viewpoint_loss, "viewpoint_loss", batch, some, reduction);
  batch.heads[0].adaptive = adaptive;
  batch.heads[0].epsilon = epsilon;
  batch.heads[0].alpha = batch.heads[1].alpha = alpha;
  const int64_t needed = workspace_bytes(batch.N, batch.K, batch.heads[1].views, identity_logits.has_value(),
                                         viewpoint_logits.has_value(), some.device_type != kDeviceCpu);
  if (!workspace.is_byte() || workspace.numel() < needed) refuse("workspace", "is too small");
  check_contiguous(workspace, "workspace");
  check_device(workspace, "workspace", batch.device_type, batch.device_id);
  call(some, KERNELS(viewpoint_aware_cross_entropy_forward), batch.heads, identity.as<int64_t>(), batch.dtype, batch.N,
       batch.K, reduction, pointer<int64_t>(label_error, "label_error", 2), workspace.data, place);
}

void backward(const OptionalArray& identity_upstream, const OptionalArray& viewpoint_upstream,
              const OptionalArray& identity_logits, const OptionalArray& viewpoint_logits, const Array& identity,
              const OptionalArray& viewpoint, const OptionalArray& mask, const Array& statistics,
              const OptionalArray& identity_grad, const OptionalArray& viewpoint_grad, int reduction_code,
              const Place& place) {
  Batch batch = check(identity_logits, viewpoint_logits, identity, viewpoint, mask, statistics);
  const Array& some = identity_logits ? *identity_logits : *viewpoint_logits;
  const Reduction reduction = check_reduction(reduction_code);
  const OptionalArray* const upstreams[2] = {&identity_upstream, &viewpoint_upstream};
  const OptionalArray* const grads[2] = {&identity_grad, &viewpoint_grad};
  for (int h = 0; h < 2; ++h) {
    CrossEntropyHead& head = batch.heads[h];
    if (!head.present) continue;
    if (!*upstreams[h] || !*grads[h]) refuse("upstream", "is needed for each head with logits, and its gradient too");
    const Array& grad = **grads[h];
    head.upstream = check_losses(**upstreams[h], "upstream", batch, some, reduction);
    check_same_dtype(grad, "grad", some, "logits");
    check_contiguous(grad, "grad");
    check_device(grad, "grad", batch.device_type, batch.device_id);
    if (grad.numel() != batch.N * batch.K * head.views) refuse("grad", "shape " + shape_text(grad) + " does not fit");
    head.grad = grad.data;
  }
  call(some, KERNELS(viewpoint_aware_cross_entropy_backward), batch.heads, identity.as<int64_t>(), batch.dtype, batch.N,
       batch.K, reduction, place);
}

}  // namespace

void bind_viewpoint_aware_cross_entropy(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("viewpoint_aware_cross_entropy_label_error", &label_error, release());
  m.def("viewpoint_aware_cross_entropy_workspace_bytes", &workspace_bytes);
  m.def("viewpoint_aware_cross_entropy_forward", &forward, release());
  m.def("viewpoint_aware_cross_entropy_backward", &backward, release());
}

}  // namespace vareid
