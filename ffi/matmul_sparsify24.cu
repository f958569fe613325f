// matmul_sparsify24: Y1 = X * W_up^T, and of it Y2 = relu(Y1)^2 pruned 2:4 inside each token and
// compressed, and Y2's non-zeros per feature before pruning. Y1 is never in memory.
#include "dense_matmul.cuh"
#include "sparsify24.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;
using dense_matmul::Tile;

struct Sparsify {
  uint4* values;       // [T, F/2], 8 a unit
  uint32_t* metadata;  // [row blocks, feature blocks, 128]
  int* counts;         // [F], zero at the start
  int tokens, features, row_blocks, feature_blocks;

  static constexpr int kScratchBytes = 0;

  // A warp takes 64 tokens by 64 features, 16 tokens at a time, as in sparsify24.cu.
  class Run {
   public:
    __device__ Run(const Sparsify& out, uint32_t tile, uint32_t, int warp)
        : out_(out), tile_(tile), warp_(warp) {}
    __device__ void finish(Tile tile) {
      constexpr int kBelow = dense_matmul::kRows / 64;
      for (int i = warp_; i < kBelow * tile.columns / 64; i += dense_matmul::kEpilogueWarps) {
        sparsify_block(tile, i % kBelow * 64, i / kBelow * 64);
      }
    }

   private:
    __device__ void sparsify_block(Tile tile, int block_row, int block_column) {
      const int lane = threadIdx.x % 32;
      const int column = block_column + lane % 4 * 16, feature = tile.first_column + column;
      const int row_block = (tile.first_row() + block_row) / 64;
      const int feature_block = (tile.first_column + block_column) / 64;
      if (row_block >= out_.row_blocks || feature_block >= out_.feature_blocks) return;
      uint32_t* words =
          out_.metadata + (int64_t(row_block) * out_.feature_blocks + feature_block) * 128 + lane;
      const bool inside = feature < out_.features;  // F is a multiple of 16
      uint32_t counts[16] = {};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = block_row + 16 * i + lane / 4, token = tile.first_row() + row;
        uint4 in[2][2] = {}, kept[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (!inside || token + 8 * half >= out_.tokens) continue;
          in[half][0] = load_shared_16(dense_matmul::unit_of(tile_, row + 8 * half, column));
          in[half][1] = load_shared_16(dense_matmul::unit_of(tile_, row + 8 * half, column + 8));
        }
        words[32 * i] = sparsify_16(in[0], in[1], kept[0], kept[1], counts);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (!inside || token + 8 * half >= out_.tokens) continue;
          __stcs(out_.values + (int64_t(token + 8 * half) * out_.features + feature) / 16,
                 kept[half]);
        }
      }
      const uint32_t count = sum_over_tokens(counts);
      if (!inside) return;
      int* total = out_.counts + feature + lane / 4 * 2;
      atomicAdd(total, count & 0xFFFF);  // integers: no order matters
      atomicAdd(total + 1, count >> 16);
    }

    const Sparsify& out_;
    const uint32_t tile_;
    const int warp_;
  };
};

ffi::Error matmul_sparsify24(cudaStream_t stream, ffi::Buffer<ffi::BF16> x,
                             ffi::Buffer<ffi::BF16> w, ffi::ResultBuffer<ffi::BF16> values,
                             ffi::ResultBuffer<ffi::U32> metadata,
                             ffi::ResultBuffer<ffi::S32> counts, int32_t group) {
  Sparsify out = {};
  out.values = reinterpret_cast<uint4*>(values->typed_data());
  out.metadata = metadata->typed_data();
  out.counts = counts->typed_data();
  out.tokens = static_cast<int>(x.dimensions()[0]);
  out.features = static_cast<int>(w.dimensions()[0]);
  out.row_blocks = static_cast<int>(metadata->dimensions()[0]);
  out.feature_blocks = static_cast<int>(metadata->dimensions()[1]);
  const cudaError_t error = cudaMemsetAsync(out.counts, 0, counts->size_bytes(), stream);
  if (error != cudaSuccess) return status("matmul_sparsify24", error);
  return dense_matmul::launch("matmul_sparsify24", stream, x, w,
                              dense_matmul::natural_rows(out.tokens), group, out);
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_matmul_sparsify24, s24jax::matmul_sparsify24,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // w_up
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()   // metadata
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // counts
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
