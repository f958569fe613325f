// split_features: the features with the most non-zeros, and the others, each in ascending order.
//
// One block: the list is short (F), and a sort of it costs more than the sparse product's whole
// epilogue. The count of the last dense feature is found bit by bit; features with more are dense,
// and so are the first of those with as many, until the number is full.
#include <cuda_runtime.h>

#include <cstdint>

#include "error.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;

constexpr int kThreads = 1024;
constexpr int kBits = 31;

// Adds `mine` over the block; `total` is in shared memory and zero.
__device__ __forceinline__ int block_sum(int mine, int* total) {
  mine = __reduce_add_sync(0xFFFFFFFF, mine);
  if (threadIdx.x % 32 == 0 && mine) atomicAdd(total, mine);
  __syncthreads();
  return *total;
}

// The sum of `mine` over the threads before this one.
__device__ int sum_before(int mine, int* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int upto = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFF, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) of_warps[warp] = upto;
  __syncthreads();
  const int total = lane < warp ? of_warps[lane] : 0;
  __syncthreads();
  return __reduce_add_sync(0xFFFFFFFF, total) + upto - mine;
}

__global__ void __launch_bounds__(kThreads)
    split_features_kernel(const int* all, int* dense, int* sparse, int features,
                          int dense_features) {
  extern __shared__ int counts[];
  __shared__ int totals[kBits + 1], of_warps[32];
  for (int f = threadIdx.x; f < features; f += kThreads) counts[f] = all[f];
  if (threadIdx.x <= kBits) totals[threadIdx.x] = 0;
  __syncthreads();
  // The largest count that at least `dense_features` features reach.
  int threshold = 0;
  for (int bit = kBits - 1; bit >= 0; bit--) {
    const int candidate = threshold | 1 << bit;
    int reach = 0;
    for (int f = threadIdx.x; f < features; f += kThreads) reach += counts[f] >= candidate;
    if (block_sum(reach, totals + bit) >= dense_features) threshold = candidate;
  }
  int above = 0;
  for (int f = threadIdx.x; f < features; f += kThreads) above += counts[f] > threshold;
  const int equal_wanted = dense_features - block_sum(above, totals + kBits);

  // Each thread places a run of features, knowing how many lie before it.
  const int run = (features + kThreads - 1) / kThreads;
  const int begin = min(features, int(threadIdx.x) * run), end = min(features, begin + run);
  int more = 0, equal = 0;
  for (int f = begin; f < end; f++) {
    more += counts[f] > threshold;
    equal += counts[f] == threshold;
  }
  int more_before = sum_before(more, of_warps), equal_before = sum_before(equal, of_warps);
  for (int f = begin; f < end; f++) {
    const int count = counts[f];
    const int dense_before = more_before + min(equal_before, equal_wanted);
    if (count > threshold || (count == threshold && equal_before < equal_wanted)) {
      dense[dense_before] = f;
    } else {
      sparse[f - dense_before] = f;
    }
    more_before += count > threshold;
    equal_before += count == threshold;
  }
}

ffi::Error split_features(cudaStream_t stream, ffi::Buffer<ffi::S32> counts,
                          ffi::ResultBuffer<ffi::S32> dense, ffi::ResultBuffer<ffi::S32> sparse) {
  const int bytes = static_cast<int>(counts.size_bytes());
  cudaError_t error = cudaFuncSetAttribute(split_features_kernel,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return status("split_features", error);
  split_features_kernel<<<1, kThreads, bytes, stream>>>(
      counts.typed_data(), dense->typed_data(), sparse->typed_data(),
      static_cast<int>(counts.element_count()), static_cast<int>(dense->element_count()));
  return status("split_features", cudaGetLastError());
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_split_features, s24jax::split_features,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // counts
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // dense
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>(),  // sparse
                              {xla::ffi::Traits::kCmdBufferCompatible});
