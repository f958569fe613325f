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

// relu of two bf16; NaN becomes the canonical NaN (0x7fff), which ranks above all other bits.
__device__ __forceinline__ uint32_t relu_pair(uint32_t pair) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0));
  return result;
}

struct Kept {
  uint32_t first, second;  // bits of the kept elements, in the order of their positions
  uint32_t nibble;         // their positions, i0 | i1 << 2
};

// The two largest of four ranks of at most 16 bits; the earlier of two equal ones wins. A rank's
// key carries 3 minus its position in the low bits, so that no two keys are equal.
__device__ __forceinline__ Kept choose_two(uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t k0 = r0 << 2 | 3, k1 = r1 << 2 | 2, k2 = r2 << 2 | 1, k3 = r3 << 2;
  const uint32_t high01 = max(k0, k1), low01 = min(k0, k1);
  const uint32_t high23 = max(k2, k3), low23 = min(k2, k3);
  const uint32_t largest = max(high01, high23);
  const uint32_t next = max(min(high01, high23), max(low01, low23));
  const bool in_order = (largest & 3) > (next & 3);
  const uint32_t a = in_order ? largest : next, b = in_order ? next : largest;
  return {a >> 2, b >> 2, (~a & 3) | (~b & 3) << 2};
}

// relu(y)^2 of a kept element, rounded once; squares below the smallest normal number are zero.
__device__ __forceinline__ uint32_t square_pair(uint32_t first, uint32_t second) {
  float x, y;
  asm("mul.ftz.f32 %0, %1, %1;" : "=f"(x) : "f"(__uint_as_float(first << 16)));
  asm("mul.ftz.f32 %0, %1, %1;" : "=f"(y) : "f"(__uint_as_float(second << 16)));
  const __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(x, y));
  return reinterpret_cast<const uint32_t&>(pair);
}

// 16 features of one token: 8 kept values (16 bytes) and 4 nibbles; adds to the counts of
// non-zeros, two features a word.
__device__ __forceinline__ uint32_t sparsify_16(const uint4 (&in)[2], uint4& out,
                                                uint32_t (&counts)[8]) {
  const uint32_t pairs[8] = {in[0].x, in[0].y, in[0].z, in[0].w,
                             in[1].x, in[1].y, in[1].z, in[1].w};
  uint32_t kept[4], nibbles = 0;
#pragma unroll
  for (int group = 0; group < 4; group++) {
    const uint32_t low = relu_pair(pairs[2 * group]), high = relu_pair(pairs[2 * group + 1]);
    // From 0x2000 = 2^-63 on, a square is not zero: adding 0x6000 carries into the sign bit.
    counts[2 * group] += (low + 0x60006000u) >> 15 & 0x00010001u;
    counts[2 * group + 1] += (high + 0x60006000u) >> 15 & 0x00010001u;
    const Kept two = choose_two(low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16);
    kept[group] = square_pair(two.first, two.second);
    nibbles |= two.nibble << (4 * group);
  }
  out = make_uint4(kept[0], kept[1], kept[2], kept[3]);
  return nibbles;
}

__global__ void __launch_bounds__(32 * kWarps) sparsify24_kernel(const Arguments arg) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature_block = blockIdx.x * 2 + warp / 4;
  const int feature = feature_block * 64 + lane % 4 * 16;
  const bool inside = feature < arg.features;  // F is a multiple of 16
  uint32_t counts[8] = {};
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
      uint32_t word = 0;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = first_token + 8 * half;
        uint4 out;
        word |= sparsify_16(in[half], out, counts) << (16 * half);
        if (inside && token < arg.tokens) {
          *reinterpret_cast<uint4*>(arg.values + (int64_t(token) * arg.features + feature) / 2) =
              out;
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
#pragma unroll
  for (int i = 0; i < 8; i++) {
    for (int other = 4; other < 32; other *= 2) {
      counts[i] += __shfl_xor_sync(0xFFFFFFFF, counts[i], other);
    }
  }
  if (lane < 4) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int* total = totals + warp / 4 * 64 + lane * 16 + 2 * i;
      atomicAdd(total, counts[i] & 0xFFFF);
      atomicAdd(total + 1, counts[i] >> 16);
    }
  }
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
