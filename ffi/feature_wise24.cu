// feature_wise24: from the token-wise compressed Y2 and dY1 (one mask) to the operands of the two
// weight gradients: sparse features pruned 2:4 in groups of four tokens and compressed, dense
// features as they are, in one pass.
//
// A block takes 32 groups of 4 tokens by 128 features. The copy engine lays the compressed values
// of its 128 tokens in shared memory; then lane j of each warp holds group j, and the warp walks 16
// features. So the 32 groups of a feature, 128 bytes of its row, are written at once, wherever in
// the result the split puts that row.

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

struct Operand {
  CUtensorMap tokens;  // values [T, F/2] as (kept, group, member)
  // Two bf16 a word.
  uint32_t* sparse;  // [Fs, T/2]
  uint32_t* dense;   // [2, Fd, T/2]: members 0 and 1 of every group, then members 2 and 3
};

struct Arguments {
  Operand y2, dy1;
  const uint16_t* token_metadata;  // of y2, as halves of words
  const int* rows;                 // [F] row of a feature in sparse, or ~row in dense
  uint16_t* metadata;              // of the result, as halves of words
  int tokens, features, dense_features;
  int feature_blocks, token_blocks;  // of 64: columns of the two metadata
  int member_stride, group_stride;   // token = member_stride * member + group_stride * group
};

// Which half-word holds the nibbles of 16 positions along K (s24jax/compressed.py).
__device__ __forceinline__ int64_t half_word(int row, int k, int k_blocks) {
  const int word = row % 64 / 16 * 32 + row % 8 * 4 + k % 64 / 16;
  return ((int64_t(row / 64) * k_blocks + k / 64) * 128 + word) * 2 + row % 16 / 8;
}

__device__ __forceinline__ uint32_t word_of(const uint4& unit, int i) {
  return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w;
}

// How the two kept bf16 of a group, by its nibble, spread over the group's four positions:
// selectors of `permute(kept, 0, .)` for positions 0 and 1 (low half) and for 2 and 3.
__device__ __forceinline__ uint32_t spread_of(uint32_t nibble) {
  uint32_t selectors = 0x44444444;  // zeros
  selectors ^= (0x44u ^ 0x10u) << (8 * (nibble & 3));
  selectors ^= (0x44u ^ 0x32u) << (8 * (nibble >> 2));
  return selectors;
}

// The instruction itself: `__byte_perm` masks the selector first.
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(selector));
  return result;
}

// Words hold two features from here on, 16 bits each.
constexpr uint32_t kSigns = 0x80008000;
constexpr uint32_t kNaNs = 0x7F817F81;  // no rank is higher: NaNs are equal

// All ones in each half whose sign bit is set.
__device__ __forceinline__ uint32_t mask_of_signs(uint32_t pair) {
  return permute(pair, 0, 0xBB99);
}

__device__ __forceinline__ uint32_t majority(uint32_t x, uint32_t y, uint32_t z) {
  return (x & y) | (x & z) | (y & z);
}

__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t yes, uint32_t no) {
  return (mask & yes) | (~mask & no);
}

// Masks of the two largest of four ranks, for two features: kept is who beats two of the other
// three. Ranks have 15 bits, so that a difference's sign bit tells who is larger; the earlier of
// two equal ones beats the later.
__device__ __forceinline__ void choose_pairs(const uint32_t (&rank)[4], uint32_t (&kept)[4]) {
  const uint32_t r0 = rank[0] | kSigns, r1 = rank[1] | kSigns, r2 = rank[2] | kSigns;
  const uint32_t b01 = r0 - rank[1], b02 = r0 - rank[2], b03 = r0 - rank[3];
  const uint32_t b12 = r1 - rank[2], b13 = r1 - rank[3], b23 = r2 - rank[3];
  kept[0] = mask_of_signs(majority(b01, b02, b03));
  kept[1] = mask_of_signs(majority(~b01, b12, b13));
  kept[2] = mask_of_signs(majority(~b02, ~b12, b23));
  kept[3] = mask_of_signs(majority(~b03, ~b13, ~b23));
}

// The kept members of two features, as one word a feature: the first in its low half.
__device__ __forceinline__ void compress_pairs(const uint32_t (&member)[4],
                                               const uint32_t (&kept)[4], uint32_t (&words)[2]) {
  const uint32_t first = select(kept[0], member[0], select(kept[1], member[1], member[2]));
  const uint32_t second = select(kept[3], member[3], select(kept[2], member[2], member[1]));
  words[0] = permute(first, second, 0x5410);
  words[1] = permute(first, second, 0x7632);
}

// The nibbles i0 | i1 << 2 of two features, in the low bits of each half.
__device__ __forceinline__ uint32_t nibble_pairs(const uint32_t (&kept)[4]) {
  return (~kept[0] & kept[1] & 0x00010001) | (~kept[0] & ~kept[1] & 0x00020002) |
         ((kept[3] | ~kept[2]) & 0x00040004) | ((kept[3] | kept[2]) & 0x00080008);
}

// Transposes 4 x 4 half-words among the four lanes of a quad: lane q gives half-word i to lane i.
__device__ __forceinline__ uint64_t transpose_quad(uint64_t mine, int lane) {
  uint64_t result = 0;
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const int other = lane % 4 ^ step;
    const uint32_t give = static_cast<uint32_t>(mine >> (16 * other)) & 0xFFFF;
    const uint64_t got = __shfl_xor_sync(0xFFFFFFFF, give, step);
    result |= got << (16 * other);
  }
  return result;
}

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
    copy_box(shared, &arg.y2.tokens, barrier, first_feature / 2, first_group, 0);
    copy_box(shared + kBoxBytes, &arg.dy1.tokens, barrier, first_feature / 2, first_group, 0);
  }
  const int feature = first_feature + 16 * warp, group = first_group + lane;
  const bool inside = feature < arg.features && group < arg.tokens / 4;
  uint32_t token_nibbles[4];  // of 16 features, one word a member
#pragma unroll
  for (int member = 0; member < 4; member++) {
    const int token = member * arg.member_stride + group * arg.group_stride;
    token_nibbles[member] =
        inside ? __ldg(arg.token_metadata + half_word(token, feature, arg.feature_blocks)) : 0x4444;
  }
  __shared__ uint32_t spreads[16];
  if (threadIdx.x < 16) spreads[threadIdx.x] = spread_of(threadIdx.x);
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
  // Of 8 features each: the even ones in the low half, the odd ones in the high half.
  uint32_t nibbles[2] = {};
  const uint32_t row_words = arg.tokens / 4;
#pragma unroll
  for (int g = 0; g < 4; g++) {  // groups of 4 features
    uint32_t spread[4];
#pragma unroll
    for (int member = 0; member < 4; member++) {
      spread[member] = spreads[token_nibbles[member] >> (4 * g) & 0xF];
    }
    const int4 rows =
        inside ? __ldg(reinterpret_cast<const int4*>(arg.rows + feature) + g) : int4{};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      uint32_t y2_member[4], dy1_member[4], rank[4], kept[4], y2_words[2], dy1_words[2];
#pragma unroll
      for (int member = 0; member < 4; member++) {
        const uint32_t selector = spread[member] >> (16 * pair);
        y2_member[member] = permute(word_of(y2[member], g), 0, selector);
        dy1_member[member] = permute(word_of(dy1[member], g), 0, selector);
        rank[member] = __vminu2(y2_member[member] & ~kSigns, kNaNs);
      }
      choose_pairs(rank, kept);
      compress_pairs(y2_member, kept, y2_words);
      compress_pairs(dy1_member, kept, dy1_words);
      nibbles[g / 2] |= nibble_pairs(kept) << (4 * (2 * (g % 2) + pair));
      if (!inside) continue;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = pair == 0 ? (i == 0 ? rows.x : rows.y) : (i == 0 ? rows.z : rows.w);
        if (row >= 0) {
          const uint32_t to = row * row_words + group;
          arg.y2.sparse[to] = y2_words[i];
          arg.dy1.sparse[to] = dy1_words[i];
        } else {
          const uint32_t halves = i == 0 ? 0x5410 : 0x7632;
#pragma unroll
          for (int plane = 0; plane < 2; plane++) {
            const uint32_t to = (plane * arg.dense_features + ~row) * row_words + group;
            const int m = 2 * plane;
            arg.y2.dense[to] = permute(y2_member[m], y2_member[m + 1], halves);
            arg.dy1.dense[to] = permute(dy1_member[m], dy1_member[m + 1], halves);
          }
        }
      }
    }
  }
  // Groups beyond T keep the legal nibble of an empty group; those beyond the last block are
  // nobody's.
  if (group >= arg.tokens / 4) nibbles[0] = nibbles[1] = 0x44444444;
  // Lane q of a quad takes the four features of half-word q, of the quad's four groups.
  const uint64_t of_quad = transpose_quad(uint64_t(nibbles[1]) << 32 | nibbles[0], lane);
  if (feature >= arg.features || 4 * group / 64 >= arg.token_blocks) return;
  const int quarter = lane % 4, first = quarter / 2 * 8 + quarter % 2;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t half = 0;
#pragma unroll
    for (int member = 0; member < 4; member++) {
      half |= static_cast<uint32_t>(of_quad >> (16 * member + 4 * i) & 0xF) << (4 * member);
    }
    const int row = __ldg(arg.rows + feature + first + 2 * i);
    if (row >= 0) {
      arg.metadata[half_word(row, group / 4 * 16, arg.token_blocks)] = static_cast<uint16_t>(half);
    }
  }
}

// Where each feature goes, from the lists of those that are dense and sparse.
__global__ void place_features(const int* dense, const int* sparse, int dense_features,
                               int features, int* rows) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < dense_features) {
    rows[dense[i]] = ~i;
  } else if (i < features) {
    rows[sparse[i - dense_features]] = i - dense_features;
  }
}

ffi::Error feature_wise24(
    cudaStream_t stream, ffi::Buffer<ffi::BF16> y2, ffi::Buffer<ffi::U32> mask,
    ffi::Buffer<ffi::BF16> dy1, ffi::Buffer<ffi::S32> dense, ffi::Buffer<ffi::S32> sparse,
    ffi::ResultBuffer<ffi::BF16> y2_sparse, ffi::ResultBuffer<ffi::BF16> dy1_sparse,
    ffi::ResultBuffer<ffi::U32> metadata, ffi::ResultBuffer<ffi::BF16> y2_dense,
    ffi::ResultBuffer<ffi::BF16> dy1_dense, ffi::ResultBuffer<ffi::S32> rows, int32_t strided) {
  const int64_t tokens = y2.dimensions()[0], kept = y2.dimensions()[1];
  if (tokens * kept >= int64_t(1) << 32) return failed("feature_wise24", "more than 2^33 elements");
  Arguments arg = {};
  arg.tokens = static_cast<int>(tokens);
  arg.features = static_cast<int>(2 * kept);
  arg.dense_features = static_cast<int>(y2_dense->dimensions()[1]);
  arg.token_metadata = reinterpret_cast<const uint16_t*>(mask.typed_data());
  arg.rows = rows->typed_data();
  arg.metadata = reinterpret_cast<uint16_t*>(metadata->typed_data());
  arg.feature_blocks = static_cast<int>(mask.dimensions()[1]);
  arg.token_blocks = static_cast<int>(metadata->dimensions()[1]);
  arg.member_stride = strided ? arg.tokens / 4 : 1;
  arg.group_stride = strided ? 1 : 4;
  const auto bind = [&](Operand& operand, const void* values, void* sparse, void* dense) {
    operand.sparse = static_cast<uint32_t*>(sparse);
    operand.dense = static_cast<uint32_t*>(dense);
    return map_tensor(&operand.tokens, values, 2, {kept, tokens / 4, 4},
                      {kept * arg.group_stride, kept * arg.member_stride},
                      {kFeatures / 2, kGroups, 4}, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (!bind(arg.y2, y2.untyped_data(), y2_sparse->untyped_data(), y2_dense->untyped_data()) ||
      !bind(arg.dy1, dy1.untyped_data(), dy1_sparse->untyped_data(), dy1_dense->untyped_data())) {
    return failed("feature_wise24", "cuTensorMapEncodeTiled refused an operand");
  }
  // The rows that pad the last 64 belong to no feature: empty groups.
  const int64_t row_blocks = metadata->dimensions()[0], block = 128 * arg.token_blocks;
  if (y2_sparse->dimensions()[0] % 64) {
    const cudaError_t error = cudaMemsetAsync(metadata->typed_data() + (row_blocks - 1) * block,
                                              0x44, block * sizeof(uint32_t), stream);
    if (error != cudaSuccess) return status("feature_wise24", error);
  }
  place_features<<<(arg.features + 255) / 256, 256, 0, stream>>>(
      dense.typed_data(), sparse.typed_data(), arg.dense_features, arg.features,
      rows->typed_data());
  const dim3 grid((arg.features + kFeatures - 1) / kFeatures,
                  (arg.tokens / 4 + kGroups - 1) / kGroups);
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
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // rows, for the kernel
                                  .Attr<int32_t>("strided"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
