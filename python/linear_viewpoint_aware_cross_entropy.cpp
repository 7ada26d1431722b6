#include "linear_viewpoint_aware_cross_entropy.h"

#include "array.h"
#include "bindings.h"

namespace vareid {
namespace {

// Checks what lies beside a tile: its device, its element type and that it is dense.
class Beside {
 public:
  explicit Beside(const Array& some) : some_(some) {}
  void here(const Array& array, const char* name) const {
    check_contiguous(array, name);
    check_device(array, name, some_.device_type, some_.device_id);
  }
  void accumulator(const Array& array, const char* name) const {
    check_accumulator(array, name, some_);
    here(array, name);
  }
  void doubles(const Array& array, const char* name) const {
    check_double(array, name);
    here(array, name);
  }
  void labels(const Array& array, const char* name, int64_t N) const {
    check_shape(array, name, {N});
    check_int64(array, name);
    here(array, name);
  }

 private:
  const Array& some_;
};

void set_labels(LogitsTile& tile, const Beside& beside, const Array& identity, const OptionalArray& viewpoint,
                const OptionalArray& mask) {
  beside.labels(identity, "identity", tile.N);
  tile.identity = identity.as<int64_t>();
  if (viewpoint && viewpoint->ndim == 2) {
    check_shape(*viewpoint, "viewpoint", {tile.N, tile.views});
    beside.doubles(*viewpoint, "viewpoint");
    tile.distribution = viewpoint->as<double>();
  } else if (viewpoint) {
    beside.labels(*viewpoint, "viewpoint", tile.N);
    tile.viewpoint = viewpoint->as<int64_t>();
  }
  if (mask) {
    check_shape(*mask, "mask", {tile.K, tile.views});
    if (!mask->is_bool()) refuse("mask", "must be bool");
    beside.here(*mask, "mask");
    tile.mask = mask->as<uint8_t>();
  }
}

LogitsTile tile_of(const Array& logits, const OptionalArray& scale, const Array& identity,
                   const OptionalArray& viewpoint, const OptionalArray& mask, int64_t K, int64_t V, int64_t first) {
  if (logits.ndim != 2 || V < 1 || logits.shape[1] % V != 0)
    refuse("logits", "shape " + shape_text(logits) + " does not fit");
  if (logits.shape[1] > 1 && logits.strides[1] != 1) refuse("logits", "must have dense rows");
  check_float(logits, "logits");
  LogitsTile tile = {};
  tile.logits = logits.data;
  tile.N = logits.shape[0];
  tile.row_stride = tile.N > 1 ? logits.strides[0] : logits.shape[1];
  tile.K = K;
  tile.views = V;
  tile.first = first;
  tile.identities = logits.shape[1] / V;
  if (first < 0 || first + tile.identities > K) refuse("first", "the tile is not within the identities");
  const Beside beside(logits);
  set_labels(tile, beside, identity, viewpoint, mask);
  if (scale) {
    check_shape(*scale, "scale", {logits.shape[1]});
    beside.accumulator(*scale, "scale");
    tile.scale = scale->data;
  }
  return tile;
}

int64_t parts(int64_t N, int64_t columns, bool cuda) {
#ifdef VAREID_WITH_CUDA
  if (cuda) return linear_viewpoint_aware_cross_entropy_parts_cuda(N, columns);
#endif
  (void)cuda;
  return linear_viewpoint_aware_cross_entropy_parts_cpu(N, columns);
}

OthersSummary* check_summaries(const Array& summaries, const Array& own_logits, int64_t N, int64_t V,
                               const Beside& beside) {
  if (summaries.ndim != 3) refuse("summaries", "shape " + shape_text(summaries) + ", expected [N, parts, 4]");
  check_shape(summaries, "summaries", {N, summaries.shape[1], 4});
  beside.doubles(summaries, "summaries");
  check_shape(own_logits, "own_logits", {V, N});
  beside.doubles(own_logits, "own_logits");
  return summaries.as<OthersSummary>();
}

void summarise_tile(const Array& logits, const OptionalArray& scale, const Array& identity, const OptionalArray& mask,
                    const Array& summaries, const Array& own_logits, int64_t K, int64_t V, int64_t first,
                    int64_t first_part, const Place& place) {
  const LogitsTile tile = tile_of(logits, scale, identity, std::nullopt, mask, K, V, first);
  const bool cuda = logits.device_type == kDeviceCuda;
  OthersSummary* const out = check_summaries(summaries, own_logits, tile.N, V, Beside(logits));
  if (first_part < 0 || first_part + parts(tile.N, logits.shape[1], cuda) > summaries.shape[1])
    refuse("first_part", "the tile's summaries do not fit");
  call(logits, KERNELS(linear_viewpoint_aware_cross_entropy_summarise), tile, out, summaries.shape[1], first_part,
       own_logits.as<double>(), logits.dtype(), place);
}

void finish(const Array& summaries, const Array& own_logits, const Array& identity, const OptionalArray& viewpoint,
            const OptionalArray& mask, const Array& loss, const Array& statistics, bool adaptive, double alpha,
            double epsilon, int64_t K, const OptionalArray& label_error, const Place& place) {
  LogitsTile tile = {};
  tile.N = identity.shape[0];
  tile.K = K;
  tile.views = own_logits.shape[0];
  const Beside beside(loss);
  set_labels(tile, beside, identity, viewpoint, mask);
  const OthersSummary* const in = check_summaries(summaries, own_logits, tile.N, tile.views, beside);
  check_shape(loss, "loss", {tile.N});
  beside.accumulator(loss, "loss");
  check_shape(statistics, "statistics", {kStatistics, tile.N});
  beside.doubles(statistics, "statistics");
  const Smoothing smoothing{adaptive, alpha, epsilon};
  call(loss, KERNELS(linear_viewpoint_aware_cross_entropy_finish), tile, in, summaries.shape[1],
       own_logits.as<double>(), smoothing, statistics.as<double>(), loss.data,
       pointer<int64_t>(label_error, "label_error", 2), loss.dtype(), place);
}

void gradient(const Array& logits, const OptionalArray& scale, const Array& identity, const OptionalArray& viewpoint,
              const OptionalArray& mask, const Array& statistics, const Array& upstream, double share, int64_t K,
              int64_t V, int64_t first, const Place& place) {
  const LogitsTile tile = tile_of(logits, scale, identity, viewpoint, mask, K, V, first);
  const Beside beside(logits);
  check_shape(statistics, "statistics", {kStatistics, tile.N});
  beside.doubles(statistics, "statistics");
  beside.accumulator(upstream, "upstream");
  if (upstream.ndim == 1) check_shape(upstream, "upstream", {tile.N});
  if (upstream.ndim > 1) refuse("upstream", "shape " + shape_text(upstream) + ", expected [] or [N]");
  call(logits, KERNELS(linear_viewpoint_aware_cross_entropy_gradient), tile, statistics.as<double>(), upstream.data,
       int64_t{upstream.ndim}, share, logits.dtype(), place);
}

void inverse_norms(const Array& x, const Array& inverse, const Place& place) {
  if (x.ndim != 2) refuse("x", "shape " + shape_text(x) + ", expected [rows, D]");
  check_float(x, "x");
  check_contiguous(x, "x");
  check_shape(inverse, "inverse", {x.shape[0]});
  Beside(x).accumulator(inverse, "inverse");
  call(x, KERNELS(linear_viewpoint_aware_cross_entropy_inverse_norms), x.data, inverse.data, x.shape[0], x.shape[1],
       x.dtype(), place);
}

void project(const Array& x, const Array& inverse, const Array& grad, const Place& place) {
  if (x.ndim != 2) refuse("x", "shape " + shape_text(x) + ", expected [rows, D]");
  check_float(x, "x");
  check_contiguous(x, "x");
  const Beside beside(x);
  check_shape(inverse, "inverse", {x.shape[0]});
  beside.accumulator(inverse, "inverse");
  check_shape(grad, "grad", {x.shape[0], x.shape[1]});
  check_same_dtype(grad, "grad", x, "x");
  beside.here(grad, "grad");
  call(x, KERNELS(linear_viewpoint_aware_cross_entropy_project), x.data, inverse.data, grad.data, x.shape[0],
       x.shape[1], x.dtype(), place);
}

void scale(const Array& grad, const Array& factor, const Place& place) {
  check_float(grad, "grad");
  check_contiguous(grad, "grad");
  const Beside beside(grad);
  check_shape(factor, "factor", {});
  beside.accumulator(factor, "factor");
  call(grad, KERNELS(linear_viewpoint_aware_cross_entropy_scale), grad.data, factor.data, grad.numel(), grad.dtype(),
       place);
}

}  // namespace

void bind_linear_viewpoint_aware_cross_entropy(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("linear_viewpoint_aware_cross_entropy_parts", &parts);
  m.def("linear_viewpoint_aware_cross_entropy_summarise", &summarise_tile, release());
  m.def("linear_viewpoint_aware_cross_entropy_finish", &finish, release());
  m.def("linear_viewpoint_aware_cross_entropy_gradient", &gradient, release());
  m.def("linear_viewpoint_aware_cross_entropy_inverse_norms", &inverse_norms, release());
  m.def("linear_viewpoint_aware_cross_entropy_project", &project, release());
  m.def("linear_viewpoint_aware_cross_entropy_scale", &scale, release());
}

}  // namespace vareid
