// sparsify24: Y2 = relu(Y1)^2 pruned 2:4 inside each token and compressed, and Y2's non-zeros per
// feature before pruning, in one pass over Y1.
//
// A thread makes one word of metadata at a time (see s24jax/compressed.py): 16 features of two
// tokens that lie 8 apart. A warp covers 16 tokens by 64 features, so that it reads and writes
// whole lines.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "error.cuh"
#include "sparsify24.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;

constexpr int kWarps = 8;      // of a block: 4 times 16 tokens, 2 times 64 features
constexpr int kRowBlocks = 4;  // of 64 tokens, one after the other
constexpr int kBlockFeatures = 128;

struct Arguments {
  const __nv_bfloat16* y1;  // [T, F]
  __nv_bfloat16* values;    // [T, F/2]
  uint32_t* metadata;       // [row blocks, feature blocks, 128]
  int* counts;              // [F], zero at the start
  int tokens, features, row_blocks, feature_blocks;
};

__global__ void __launch_bounds__(32 * kWarps) sparsify24_kernel(const Arguments arg) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature_block = blockIdx.x * 2 + warp / 4;
  const int feature = feature_block * 64 + lane % 4 * 16;
  const bool inside = feature < arg.features;  // F is a multiple of 16
  uint32_t counts[16] = {};
  if (feature_block < arg.feature_blocks) {
    for (int i = 0; i < kRowBlocks; i++) {
      const int row_block = blockIdx.y * kRowBlocks + i;
      if (row_block >= arg.row_blocks) break;
      const int first_token = row_block * 64 + warp % 4 * 16 + lane / 4;
      uint4 in[2][2] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = first_token + 8 * half;
        if (inside && token < arg.tokens) {
          const auto* from =
              reinterpret_cast<const uint4*>(arg.y1 + int64_t(token) * arg.features + feature);
          in[half][0] = __ldg(from);
          in[half][1] = __ldg(from + 1);
        }
      }
      uint4 out[2];
      const uint32_t word = sparsify_16(in[0], in[1], out[0], out[1], counts);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = first_token + 8 * half;
        if (inside && token < arg.tokens) {
          *reinterpret_cast<uint4*>(arg.values + (int64_t(token) * arg.features + feature) / 2) =
              out[half];
        }
      }
      arg.metadata[(int64_t(row_block) * arg.feature_blocks + feature_block) * 128 + warp % 4 * 32 +
                   lane] = word;
    }
  }
  // Sum over the 8 threads of the warp that share the features, then over the block's warps.
  __shared__ int totals[kBlockFeatures];
  if (threadIdx.x < kBlockFeatures) totals[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t count = sum_over_tokens(counts);
  int* total = totals + warp / 4 * 64 + lane % 4 * 16 + lane / 4 * 2;
  atomicAdd(total, count & 0xFFFF);
  atomicAdd(total + 1, count >> 16);
  __syncthreads();
  const int counted = blockIdx.x * kBlockFeatures + threadIdx.x;
  if (threadIdx.x < kBlockFeatures && counted < arg.features) {
    atomicAdd(arg.counts + counted, totals[threadIdx.x]);  // integers: no order matters
  }
}

ffi::Error sparsify24(cudaStream_t stream, ffi::Buffer<ffi::BF16> y1,
                      ffi::ResultBuffer<ffi::BF16> values, ffi::ResultBuffer<ffi::U32> metadata,
                      ffi::ResultBuffer<ffi::S32> counts) {
  Arguments arg = {};
  arg.y1 = reinterpret_cast<const __nv_bfloat16*>(y1.typed_data());
  arg.values = reinterpret_cast<__nv_bfloat16*>(values->typed_data());
  arg.metadata = metadata->typed_data();
  arg.counts = counts->typed_data();
  arg.tokens = static_cast<int>(y1.dimensions()[0]);
  arg.features = static_cast<int>(y1.dimensions()[1]);
  arg.row_blocks = static_cast<int>(metadata->dimensions()[0]);
  arg.feature_blocks = static_cast<int>(metadata->dimensions()[1]);
  cudaError_t error = cudaMemsetAsync(arg.counts, 0, counts->size_bytes(), stream);
  if (error != cudaSuccess) return status("sparsify24", error);
  const dim3 grid((arg.feature_blocks + 1) / 2, (arg.row_blocks + kRowBlocks - 1) / kRowBlocks);
  if (grid.x == 0 || grid.y == 0) return ffi::Error::Success();
  sparsify24_kernel<<<grid, 32 * kWarps, 0, stream>>>(arg);
  return status("sparsify24", cudaGetLastError());
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_sparsify24, s24jax::sparsify24,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // y1
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()   // metadata
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>(),  // counts
                              {xla::ffi::Traits::kCmdBufferCompatible});
