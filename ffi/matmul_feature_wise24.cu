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

struct FeatureWise {
  const uint4* y2;  // values [T, F/2], 8 a unit
  uint4* dy1;       // likewise
  TokenMask mask;
  WeightOperands out;

  static constexpr int kScratchBytes = dense_matmul::kEpilogueWarps * kStagedBytes;

  class Run {
   public:
    __device__ Run(const FeatureWise& arg, uint32_t tile, uint32_t scratch, int warp)
        : arg_(arg), tile_(tile), staged_(scratch + warp * kStagedBytes), warp_(warp) {
      if (warp == 0) selectors()[threadIdx.x % 16] = selectors_of(threadIdx.x % 16);
      named_sync(1, 32 * dense_matmul::kEpilogueWarps);
    }

    __device__ void finish(Tile tile) {
      const Lane lane(arg_, tile);
      for (int chunk = warp_; chunk < tile.columns / kChunk; chunk += dense_matmul::kEpilogueWarps) {
        work_on(tile.first_column + chunk * kChunk, chunk, lane);
      }
    }

   private:
    __device__ static SelectorTable& selectors() {
      __shared__ SelectorTable table;
      return table;
    }

    // Where this lane's group lies, at the tile's first feature.
    struct Lane {
      int group;
      bool inside;
      uint32_t units[4], nibbles[4];  // of a member: in values, and in the mask as half-words

      __device__ Lane(const FeatureWise& arg, Tile tile)
          : group(tile.row * kGroups + threadIdx.x % 32), inside(group < arg.out.tokens / 4) {
        const uint32_t feature = tile.first_column;
#pragma unroll
        for (int member = 0; member < 4; member++) {
          const uint32_t token = arg.mask.token(member, group);
          units[member] = token * (arg.out.features / 16u) + feature / 16;
          nibbles[member] = half_word(token, feature, arg.mask.feature_blocks);
        }
      }
    };

    __device__ void work_on(int feature, uint32_t chunk, const Lane& lane) {
      if (feature >= arg_.out.features) return;
      const uint32_t in_mask = half_word(0, chunk * kChunk, 1), of_warp = threadIdx.x % 32;
      uint32_t nibbles[4], spread[4][4];
      uint4 y2[4], dy1[4];
#pragma unroll
      for (int member = 0; member < 4; member++) {
        nibbles[member] =
            lane.inside ? __ldg(arg_.mask.metadata + lane.nibbles[member] + in_mask) : 0x4444;
        y2[member] = lane.inside ? __ldg(arg_.y2 + lane.units[member] + chunk) : uint4{};
      }
      const uint32_t first = dense_matmul::unit_of(tile_, of_warp, chunk * kChunk);
#pragma unroll
      for (int member = 0; member < 4; member++) {
        // Rows of a tile that are 32 apart have their units in the same order.
        const uint4 low = load_shared_16(first + member * kGroups * 128);
        const uint4 high = load_shared_16((first ^ 16) + member * kGroups * 128);
        const uint32_t dy2[4][2] = {
            {low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; g++) {
          const Selectors of = selectors()[nibbles[member] >> (4 * g) & 0xF];
          spread[member][g] = of.spread;
          words[g] = relu2_gradient_pair(word_of(y2[member], g),
                                         permute(dy2[g][0], dy2[g][1], of.gather));
        }
        dy1[member] = make_uint4(words[0], words[1], words[2], words[3]);
        if (lane.inside) __stcs(arg_.dy1 + lane.units[member] + chunk, dy1[member]);
      }
      write_group<false>(arg_.out, feature, lane.group, y2, dy1, spread, staged_);
    }

    const FeatureWise& arg_;
    const uint32_t tile_, staged_;
    const int warp_;
  };
};

ffi::Error matmul_feature_wise24(
    cudaStream_t stream, ffi::Buffer<ffi::BF16> dy3, ffi::Buffer<ffi::BF16> w,
    ffi::Buffer<ffi::BF16> y2, ffi::Buffer<ffi::U32> mask, ffi::Buffer<ffi::S32> dense,
    ffi::Buffer<ffi::S32> sparse, ffi::ResultBuffer<ffi::BF16> dy1,
    ffi::ResultBuffer<ffi::BF16> y2_sparse, ffi::ResultBuffer<ffi::BF16> dy1_sparse,
    ffi::ResultBuffer<ffi::U32> metadata, ffi::ResultBuffer<ffi::BF16> y2_dense,
    ffi::ResultBuffer<ffi::BF16> dy1_dense, ffi::ResultBuffer<ffi::S32> places, int32_t strided,
    int32_t group) {
  constexpr const char* kOp = "matmul_feature_wise24";
  const int64_t tokens = y2.dimensions()[0], kept = y2.dimensions()[1];
  if (tokens * kept >= int64_t(1) << 32) return failed(kOp, "more than 2^33 elements");
  FeatureWise epilogue = {};
  epilogue.mask = token_mask(mask, tokens, strided);
  epilogue.out = weight_operands(tokens, 2 * kept, y2_sparse, dy1_sparse, metadata, y2_dense,
                                 dy1_dense, places);
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
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // places, for the kernel
                                  .Attr<int32_t>("strided")
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
