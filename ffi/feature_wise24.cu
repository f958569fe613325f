// feature_wise24: from the token-wise compressed Y2 and dY1 (one mask) to the operands of the two
// weight gradients, in one pass.
//
// A block takes 32 groups of 4 tokens by 128 features. The copy engine lays the compressed values
// of its 128 tokens in shared memory; then lane j of each warp holds group j, and the warp walks 16
// features.
#include "feature_wise24.cuh"

#include "error.cuh"
#include "hopper.cuh"
#include "tensor_map.cuh"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;

constexpr int kGroups = 32;     // of 4 tokens, of a block
constexpr int kFeatures = 128;  // of a block: 16 of each warp
constexpr int kWarps = kFeatures / 16;
constexpr int kBoxBytes = 4 * kGroups * kFeatures;              // half of the values, 2 bytes each
constexpr int kSharedBytes = 2 * kBoxBytes + sizeof(uint64_t);  // two boxes and a barrier
static_assert(kWarps * kStagedBytes <= 2 * kBoxBytes);

struct Arguments {
  CUtensorMap y2, dy1;  // values [T, F/2] as (kept, group, member)
  TokenMask mask;
  WeightOperands out;
};

__global__ void __launch_bounds__(32 * kWarps)
    feature_wise24_kernel(const __grid_constant__ Arguments arg) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory), barrier = shared + 2 * kBoxBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_feature = blockIdx.x * kFeatures, first_group = blockIdx.y * kGroups;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, 2 * kBoxBytes);
    copy_box(shared, &arg.y2, barrier, first_feature / 2, first_group, 0);
    copy_box(shared + kBoxBytes, &arg.dy1, barrier, first_feature / 2, first_group, 0);
  }
  const int feature = first_feature + 16 * warp, group = first_group + lane;
  uint32_t token_nibbles[4];
  arg.mask.load(arg.out, feature, group, token_nibbles);
  __shared__ SelectorTable selectors;
  if (threadIdx.x < 16) selectors[threadIdx.x] = selectors_of(threadIdx.x);
  __syncthreads();
  barrier_wait(barrier, 0);

  // 16 features of a token are 8 kept values, one 16-byte unit of its row, which the swizzle moves.
  uint4 y2[4], dy1[4];
#pragma unroll
  for (int member = 0; member < 4; member++) {
    const uint32_t row = member * kGroups + lane;
    const uint32_t at = row * 128 + (warp ^ row % 8) * 16;
    y2[member] = load_shared_16(shared + at);
    dy1[member] = load_shared_16(shared + kBoxBytes + at);
  }
  uint32_t spread[4][4];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    spread[i / 4][i % 4] = selectors[token_nibbles[i / 4] >> (4 * (i % 4)) & 0xF].spread;
  }
  __syncthreads();  // what was copied is read; its place is free
  write_group<true>(arg.out, feature, group, y2, dy1, spread, shared + warp * kStagedBytes);
}

ffi::Error feature_wise24(
    cudaStream_t stream, ffi::Buffer<ffi::BF16> y2, ffi::Buffer<ffi::U32> mask,
    ffi::Buffer<ffi::BF16> dy1, ffi::Buffer<ffi::S32> dense, ffi::Buffer<ffi::S32> sparse,
    ffi::ResultBuffer<ffi::BF16> y2_sparse, ffi::ResultBuffer<ffi::BF16> dy1_sparse,
    ffi::ResultBuffer<ffi::U32> metadata, ffi::ResultBuffer<ffi::BF16> y2_dense,
    ffi::ResultBuffer<ffi::BF16> dy1_dense, ffi::ResultBuffer<ffi::S32> places, int32_t strided) {
  const int64_t tokens = y2.dimensions()[0], kept = y2.dimensions()[1];
  if (tokens * kept >= int64_t(1) << 32) return failed("feature_wise24", "more than 2^33 elements");
  Arguments arg = {};
  arg.mask = token_mask(mask, tokens, strided);
  arg.out = weight_operands(tokens, 2 * kept, y2_sparse, dy1_sparse, metadata, y2_dense, dy1_dense,
                            places);
  const auto map = [&](CUtensorMap* map, const void* values) {
    return map_tensor(map, values, 2, {kept, tokens / 4, 4},
                      {kept * arg.mask.group_stride, kept * arg.mask.member_stride},
                      {kFeatures / 2, kGroups, 4}, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (!map(&arg.y2, y2.untyped_data()) || !map(&arg.dy1, dy1.untyped_data())) {
    return failed("feature_wise24", "cuTensorMapEncodeTiled refused an operand");
  }
  const cudaError_t error = prepare(arg.out, dense.typed_data(), sparse.typed_data(), stream);
  if (error != cudaSuccess) return status("feature_wise24", error);
  const dim3 grid((arg.out.features + kFeatures - 1) / kFeatures,
                  (arg.out.tokens / 4 + kGroups - 1) / kGroups);
  feature_wise24_kernel<<<grid, 32 * kWarps, kSharedBytes, stream>>>(arg);
  return status("feature_wise24", cudaGetLastError());
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_feature_wise24, s24jax::feature_wise24,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 values
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()   // their metadata
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // dense features
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // sparse features
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 sparse
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 sparse
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()   // metadata
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2 dense
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1 dense
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // places, for the kernel
                                  .Attr<int32_t>("strided"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
