// matmul_feature_wise24: dY2 = dY3 * W_down^T, and of it dY1 = 2 * sqrt(Y2) * dY2 under the mask of
// the compressed Y2, token-wise, and the operands of both weight gradients. dY2 is never in memory.
//
// A tile holds 32 whole groups of four tokens. As in feature_wise24.cu lane j of a warp takes group
// j, 16 features at a time: of each of the four tokens 32 bytes of the tile, 16 of Y2 and of dY1.
#include "activation.cuh"
#include "dense_matmul.cuh"
#include "feature_wise24.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;
using dense_matmul::Tile;

constexpr int kGroups = dense_matmul::kRows / 4;  // of tokens, of a tile
constexpr int kChunk = 16;                        // features that a warp takes at a time
constexpr int kChunks = dense_matmul::kColumns / kChunk;

// Picks the two bf16 at a nibble's positions from the four of a group: a selector of
// `permute(members 0 and 1, members 2 and 3, .)`.
__device__ __forceinline__ uint32_t gather_of(uint32_t nibble) {
  return 0x1010 + (nibble & 3) * 0x22 + (nibble >> 2) * 0x2200;
}

struct FeatureWise {
  const uint4* y2;  // values [T, F/2], 8 a unit
  uint4* dy1;       // likewise
  TokenMask mask;
  WeightOperands out;

  class Run {
   public:
    __device__ Run(const FeatureWise& arg, uint32_t tile, int warp)
        : arg_(arg), tile_(tile), warp_(warp) {
      if (warp == 0) spreads()[threadIdx.x % 16] = spread_of(threadIdx.x % 16);
      named_sync(1, 32 * dense_matmul::kEpilogueWarps);
    }

    __device__ void prepare(Tile tile) { load(tile, warp_); }

    __device__ void finish(Tile tile) {
      for (int chunk = warp_; chunk < kChunks; chunk += dense_matmul::kEpilogueWarps) {
        work_on(tile, chunk);
      }
    }

   private:
    __device__ static uint32_t* spreads() {
      __shared__ uint32_t of_nibbles[16];
      return of_nibbles;
    }
    __device__ static int group_of(Tile tile) { return tile.row * kGroups + threadIdx.x % 32; }
    __device__ static int feature_of(Tile tile, int chunk) {
      return tile.first_column() + chunk * kChunk;
    }
    __device__ uint32_t unit_in_memory(int member, int group, int feature) const {
      const uint32_t units = arg_.out.features / 16;  // of a token
      return arg_.mask.token(member, group) * units + uint32_t(feature) / 16;
    }

    // What comes from memory for a chunk, asked for one chunk ahead.
    __device__ void load(Tile tile, int chunk) {
      const int group = group_of(tile), feature = feature_of(tile, chunk);
      arg_.mask.load(arg_.out, feature, group, next_nibbles_);
      const bool inside = arg_.out.has(feature, group);
#pragma unroll
      for (int member = 0; member < 4; member++) {
        next_y2_[member] =
            inside ? __ldg(arg_.y2 + unit_in_memory(member, group, feature)) : uint4{};
      }
    }

    __device__ void work_on(Tile tile, int chunk) {
      const int lane = threadIdx.x % 32, column = chunk * kChunk;
      const int group = group_of(tile), feature = feature_of(tile, chunk);
      const bool inside = arg_.out.has(feature, group);
      uint32_t nibbles[4];
      uint4 y2[4], dy1[4];
      int4 rows[4];
      arg_.out.load_rows(feature, rows);
#pragma unroll
      for (int member = 0; member < 4; member++) {
        nibbles[member] = next_nibbles_[member];
        y2[member] = next_y2_[member];
      }
      if (chunk + dense_matmul::kEpilogueWarps < kChunks) {
        load(tile, chunk + dense_matmul::kEpilogueWarps);
      }
#pragma unroll
      for (int member = 0; member < 4; member++) {
        const int row = member * kGroups + lane;
        const uint4 low = load_shared_16(dense_matmul::unit_of(tile_, row, column));
        const uint4 high = load_shared_16(dense_matmul::unit_of(tile_, row, column + 8));
        const uint32_t n = nibbles[member];
        const uint4 dy2 = make_uint4(permute(low.x, low.y, gather_of(n & 0xF)),
                                     permute(low.z, low.w, gather_of(n >> 4 & 0xF)),
                                     permute(high.x, high.y, gather_of(n >> 8 & 0xF)),
                                     permute(high.z, high.w, gather_of(n >> 12 & 0xF)));
        dy1[member] = make_uint4(relu2_gradient_pair(y2[member].x, dy2.x),
                                 relu2_gradient_pair(y2[member].y, dy2.y),
                                 relu2_gradient_pair(y2[member].z, dy2.z),
                                 relu2_gradient_pair(y2[member].w, dy2.w));
        if (inside) arg_.dy1[unit_in_memory(member, group, feature)] = dy1[member];
      }
      write_group(arg_.out, feature, group, y2, dy1, nibbles, rows, spreads());
    }

    const FeatureWise& arg_;
    const uint32_t tile_;
    const int warp_;
    uint32_t next_nibbles_[4];
    uint4 next_y2_[4];
  };
};

ffi::Error matmul_feature_wise24(
    cudaStream_t stream, ffi::Buffer<ffi::BF16> dy3, ffi::Buffer<ffi::BF16> w,
    ffi::Buffer<ffi::BF16> y2, ffi::Buffer<ffi::U32> mask, ffi::Buffer<ffi::S32> dense,
    ffi::Buffer<ffi::S32> sparse, ffi::ResultBuffer<ffi::BF16> dy1,
    ffi::ResultBuffer<ffi::BF16> y2_sparse, ffi::ResultBuffer<ffi::BF16> dy1_sparse,
    ffi::ResultBuffer<ffi::U32> metadata, ffi::ResultBuffer<ffi::BF16> y2_dense,
    ffi::ResultBuffer<ffi::BF16> dy1_dense, ffi::ResultBuffer<ffi::S32> rows, int32_t strided,
    int32_t group) {
  constexpr const char* kOp = "matmul_feature_wise24";
  const int64_t tokens = y2.dimensions()[0], kept = y2.dimensions()[1];
  if (tokens * kept >= int64_t(1) << 32) return failed(kOp, "more than 2^33 elements");
  FeatureWise epilogue = {};
  epilogue.mask = token_mask(mask, tokens, strided);
  epilogue.out = weight_operands(tokens, 2 * kept, y2_sparse, dy1_sparse, metadata, y2_dense,
                                 dy1_dense, rows);
  epilogue.y2 = reinterpret_cast<const uint4*>(y2.typed_data());
  epilogue.dy1 = reinterpret_cast<uint4*>(dy1->typed_data());
  const cudaError_t error =
      prepare(epilogue.out, dense.typed_data(), sparse.typed_data(), stream);
  if (error != cudaSuccess) return status(kOp, error);
  return dense_matmul::launch(kOp, stream, dy3, w, dense_matmul::grouped_rows(tokens, strided),
                              group, epilogue);
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_matmul_feature_wise24, s24jax::matmul_feature_wise24,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy3
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // w_down
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 values
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()   // their metadata
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // dense features
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // sparse features
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 values
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 sparse
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 sparse
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()   // metadata
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 dense
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 dense
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // rows, for the kernel
                                  .Attr<int32_t>("strided")
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
