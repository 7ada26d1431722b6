#include "viewpoint_aware_cross_entropy.h"

#include "cuda/cross_entropy_rows.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

// Blocks of both heads: those of the first, row by row, then those of the second.
struct Task {
  bool second;
  int64_t i, part;
  __device__ __forceinline__ Task(int64_t N, int64_t parts0, int64_t parts1) : second(blockIdx.x >= N * parts0) {
    const int64_t index = second ? blockIdx.x - N * parts0 : blockIdx.x;
    const int64_t parts = second ? parts1 : parts0;
    i = index / parts;
    part = index - i * parts;
  }
};

template <typename T, int kWidth>
__global__ void viewpoint_aware_cross_entropy_forward_kernel(DeviceRows<T> head0, DeviceRows<T> head1,
                                                             const int64_t* __restrict__ identity, int64_t N, int64_t K,
                                                             OthersSummary* __restrict__ summaries,
                                                             double* __restrict__ own_logits) {
  const Task task(N, head0.parts, head1.parts);
  const DeviceRows<T> rows = task.second ? head1 : head0;
  summarise_part<T, kWidth>(rows, N, task.i, task.part, identity_or_none(identity, task.i, K), summaries + blockIdx.x,
                            own_logits + (task.second ? N * head0.views : 0));
}

// One block for each head.
template <typename Acc>
__global__ void viewpoint_aware_cross_entropy_finish_kernel(DeviceFinish<Acc> head0, DeviceFinish<Acc> head1,
                                                            int64_t N) {
  const DeviceFinish<Acc> head = blockIdx.x == 0 ? head0 : head1;
  if (head.loss) finish_rows(head, N);  // not the statistics: those of an empty batch have no address
}

template <typename T, int kWidth>
__global__ void viewpoint_aware_cross_entropy_backward_kernel(DeviceRows<T> head0, DeviceRows<T> head1,
                                                              DeviceLabels labels0, DeviceLabels labels1, int64_t N,
                                                              int64_t K) {
  const Task task(N, head0.parts, head1.parts);
  const DeviceRows<T> rows = task.second ? head1 : head0;
  const DeviceLabels labels = task.second ? labels1 : labels0;
  const int64_t y = identity_or_none(labels.identity, task.i, K);
  differentiate_part<T, kWidth>(rows, N, task.i, task.part, y, labels.views_of(task.i, y));
}

template <typename T>
DeviceRows<T> rows_of(const CrossEntropyHead& head, int64_t N, int64_t K, Reduction reduction) {
  using Acc = typename DeviceAccumulator<T>::type;
  DeviceRows<T> rows = {};
  if (!head.present) return rows;
  rows.logits = static_cast<const T*>(head.logits);
  rows.grad = static_cast<T*>(head.grad);
  rows.mask = head.mask;
  rows.statistics = head.statistics;
  rows.upstream = static_cast<const Acc*>(head.upstream);
  rows.row_stride = head.row_stride;
  rows.grad_stride = rows.columns = K * head.views;
  rows.views = head.views;
  rows.share = reduction == Reduction::kMean ? 1 / static_cast<double>(N) : 1.0;
  rows.upstream_stride = reduction == Reduction::kNone ? 1 : 0;
  cut_rows(rows, N);
  return rows;
}

DeviceLabels labels_of(const CrossEntropyHead& head, const int64_t* identity, int64_t K) {
  return {identity, head.viewpoint, head.distribution, head.mask, K, head.views};
}

// Whether logits and gradient meet 16-byte boundaries together in every row.
template <typename T>
bool aligned_alike(const DeviceRows<T>& rows) {
  const auto offset = [](const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % (16 / sizeof(T));
  };
  return offset(rows.logits) == offset(rows.grad) &&
         (rows.row_stride - rows.grad_stride) % static_cast<int64_t>(16 / sizeof(T)) == 0;
}

template <typename T>
void forward(const CrossEntropyHead heads[2], const int64_t* identity, int64_t N, int64_t K, Reduction reduction,
             int64_t* label_error, void* workspace, cudaStream_t stream) {
  using Acc = typename DeviceAccumulator<T>::type;
  constexpr int kWidth = 16 / sizeof(T);
  const DeviceRows<T> rows[2] = {rows_of<T>(heads[0], N, K, reduction), rows_of<T>(heads[1], N, K, reduction)};
  const int64_t blocks = N * (rows[0].parts + rows[1].parts);
  OthersSummary* const summaries = static_cast<OthersSummary*>(workspace);
  double* const own_logits = reinterpret_cast<double*>(summaries + blocks);
  DeviceFinish<Acc> finish[2] = {};
  for (int h = 0; h < 2; ++h) {
    if (!heads[h].present) continue;
    finish[h] = {summaries + (h == 0 ? 0 : N * rows[0].parts),
                 rows[h].parts,
                 own_logits + (h == 0 ? 0 : N * rows[0].views),
                 labels_of(heads[h], identity, K),
                 {heads[h].adaptive, heads[h].alpha, heads[h].epsilon},
                 heads[h].statistics,
                 static_cast<Acc*>(heads[h].loss),
                 reduction == Reduction::kNone,
                 rows[h].share,
                 label_error ? label_error + h : nullptr};
  }
  if (blocks > 0)
    launch(viewpoint_aware_cross_entropy_forward_kernel<T, kWidth>, dim3(grid_size(blocks)),
           dim3(row_threads(std::max(rows[0].columns, rows[1].columns), kWidth)), 0, stream, rows[0], rows[1], identity,
           N, K, summaries, own_logits);
  launch(viewpoint_aware_cross_entropy_finish_kernel<Acc>, dim3(2), dim3(kRowThreads), 0, stream, finish[0], finish[1],
         N);
}

template <typename T, int kWidth>
void backward(const DeviceRows<T> (&rows)[2], const CrossEntropyHead heads[2], const int64_t* identity, int64_t N,
              int64_t K, cudaStream_t stream) {
  launch(viewpoint_aware_cross_entropy_backward_kernel<T, kWidth>, dim3(grid_size(N * (rows[0].parts + rows[1].parts))),
         dim3(row_threads(std::max(rows[0].columns, rows[1].columns), kWidth)), 0, stream, rows[0], rows[1],
         labels_of(heads[0], identity, K), labels_of(heads[1], identity, K), N, K);
}

}  // namespace

int64_t viewpoint_aware_cross_entropy_workspace_bytes_cuda(int64_t N, int64_t K, const int64_t views[2]) {
  int64_t of_a_row = 0;
  for (int h = 0; h < 2; ++h) {
    if (views[h] == 0) continue;
    DeviceRows<float> rows = {};
    rows.columns = K * views[h];
    cut_rows(rows, N);
    of_a_row +=
        rows.parts * static_cast<int64_t>(sizeof(OthersSummary)) + views[h] * static_cast<int64_t>(sizeof(double));
  }
  return N * of_a_row;
}

void viewpoint_aware_cross_entropy_forward_cuda(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype,
                                                int64_t N, int64_t K, Reduction reduction, int64_t* label_error,
                                                void* workspace, const Place& place) {
  check_samples(N);
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    forward<typename decltype(type)::type>(heads, identity, N, K, reduction, label_error, workspace,
                                           static_cast<cudaStream_t>(place.stream));
  });
}

void viewpoint_aware_cross_entropy_backward_cuda(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype,
                                                 int64_t N, int64_t K, Reduction reduction, const Place& place) {
  check_samples(N);
  if (N == 0) return;
  const DeviceGuard guard(place.device);
  const cudaStream_t queue = static_cast<cudaStream_t>(place.stream);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceRows<T> rows[2] = {rows_of<T>(heads[0], N, K, reduction), rows_of<T>(heads[1], N, K, reduction)};
    if (aligned_alike(rows[0]) && aligned_alike(rows[1]))
      backward<T, 16 / sizeof(T)>(rows, heads, identity, N, K, queue);
    else
      backward<T, 1>(rows, heads, identity, N, K, queue);
  });
}

}  // namespace vareid
