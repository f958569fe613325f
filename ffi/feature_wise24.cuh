// From 16 features of a group of four tokens, token-wise compressed Y2 and dY1 under one mask, to
// the operands of the two weight gradients: sparse features pruned 2:4 in the group and compressed,
// dense features as they are.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hopper.cuh"
#include "prune24.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {

// Two bf16 a word.
struct SplitOperand {
  uint32_t* sparse;  // [Fs, T/2]
  uint32_t* dense;   // [2, Fd, T/2]: members 0 and 1 of every group, then members 2 and 3
};

struct WeightOperands {
  SplitOperand y2, dy1;
  uint16_t* metadata;  // of the sparse features, as halves of words
  int* rows;           // [F] row of a feature in sparse, or ~row in dense
  int* metadata_at;    // [F] half-word of its first 16 tokens, -1 for a dense feature
  int tokens, features, dense_features;
  int token_blocks;  // of 64: columns of the metadata

  __device__ __forceinline__ bool has(int feature, int group) const {
    return feature < features && group < tokens / 4;
  }
};

// Which half-word holds the nibbles of 16 positions along K (s24jax/compressed.py). Unsigned, so
// that to divide is to shift. What `row` and `k` add to it are summands.
__device__ __forceinline__ uint32_t half_word(uint32_t row, uint32_t k, uint32_t k_blocks) {
  const uint32_t word = row % 64 / 16 * 32 + row % 8 * 4 + k % 64 / 16;
  return ((row / 64 * k_blocks + k / 64) * 128 + word) * 2 + row % 16 / 8;
}

// How the kept two of a group's four elements, by their nibble, are spread over the four positions
// and gathered from them: selectors of `permute`.
struct Selectors {
  uint32_t spread;  // of (kept, 0), for positions 0 and 1 in the low half, 2 and 3 in the high one
  uint32_t gather;  // of (positions 0 and 1, positions 2 and 3)
};

__device__ __forceinline__ Selectors selectors_of(uint32_t nibble) {
  const uint32_t i0 = nibble & 3, i1 = nibble >> 2;
  uint32_t spread = 0x44444444;  // zeros
  spread ^= (0x44u ^ 0x10u) << (8 * i0);
  spread ^= (0x44u ^ 0x32u) << (8 * i1);
  return {spread, 0x1010 + i0 * 0x22 + i1 * 0x2200};
}

// Those of every nibble, in shared memory.
using SelectorTable = Selectors[16];

// The kept members of two features, as one word a feature.
__device__ __forceinline__ void compress_pairs(const uint32_t (&member)[4],
                                               const uint32_t (&kept)[4], uint32_t (&words)[2]) {
  const uint32_t first = first_kept(member, kept), second = second_kept(member, kept);
  words[0] = permute(first, second, 0x5410);
  words[1] = permute(first, second, 0x7632);
}

// From `nibbles_of` two times two features, half-words of all four in order: the groups `first` and
// `second` of four features.
__device__ __forceinline__ uint32_t half_words(const uint32_t (&first)[2],
                                               const uint32_t (&second)[2]) {
  // Bytes: features 0, 2, 1, 3, each twice.
  const uint32_t a = select(0x00FF00FF, first[0], first[1]);
  const uint32_t b = select(0x00FF00FF, second[0], second[1]);
  return select(0x0F0F0F0F, permute(a, b, 0x5410), permute(a, b, 0x7632));
}

// Transposes nibbles among the four lanes of a quad. A lane brings 4 x 4 of its own group, as
// half-words of four features; lane q takes those of half-word q, group m from lane m, as
// half-words of one feature: features 0 and 1 in the first word, 2 and 3 in the second.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[2], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  const uint32_t mine = high ? words[1] : words[0];
  const uint32_t theirs = __shfl_xor_sync(0xFFFFFFFF, high ? words[0] : words[1], 2);
  const uint32_t keep = permute(mine, theirs, odd ? 0x7632 : 0x5410);
  const uint32_t got =
      __shfl_xor_sync(0xFFFFFFFF, permute(mine, theirs, odd ? 0x5410 : 0x7632), 1);
  // Groups 0 and 1, and groups 2 and 3: from whom they are depends on the lane.
  const uint32_t first = odd ? 0x1054 : 0x5410, second = odd ? 0x3276 : 0x7632;
  uint32_t pairs[2];  // of groups; a byte for each feature
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t groups = permute(keep, got, (i == 0) != high ? first : second);
    const uint32_t even = groups & 0x0F0F0F0F, odd_ones = groups >> 4 & 0x0F0F0F0F;
    pairs[i] = permute(even, odd_ones, 0x5140) + (permute(even, odd_ones, 0x7362) << 4);
  }
  words[0] = permute(pairs[0], pairs[1], 0x5140);
  words[1] = permute(pairs[0], pairs[1], 0x7362);
}

// The nibbles of the tokens' mask, and which tokens share a group.
struct TokenMask {
  const uint16_t* metadata;  // as halves of words
  int feature_blocks;        // of 64: its columns
  int member_stride, group_stride;

  __device__ __forceinline__ int token(int member, int group) const {
    return member * member_stride + group * group_stride;
  }

  // Of 16 features, one word a member.
  __device__ __forceinline__ void load(const WeightOperands& out, int feature, int group,
                                       uint32_t (&nibbles)[4]) const {
    const bool inside = out.has(feature, group);
#pragma unroll
    for (int member = 0; member < 4; member++) {
      const uint32_t at = half_word(token(member, group), feature, feature_blocks);
      nibbles[member] = inside ? __ldg(metadata + at) : 0x4444;
    }
  }
};

inline TokenMask token_mask(const xla::ffi::Buffer<xla::ffi::U32>& metadata, int tokens,
                            bool strided) {
  return {reinterpret_cast<const uint16_t*>(metadata.typed_data()),
          static_cast<int>(metadata.dimensions()[1]), strided ? tokens / 4 : 1, strided ? 1 : 4};
}

// What a warp needs in shared memory to write 16 features of 32 groups: words of Y2, then of dY1.
constexpr int kStagedBytes = 2 * 16 * 32 * 4;

// One word of every group, of each sparse feature: to its row, from `staged`.
__device__ __forceinline__ void write_rows(const WeightOperands& out, uint32_t* to,
                                           uint32_t staged, int row, int first_group) {
  const int lane = threadIdx.x % 32, groups = out.tokens / 4;
  if (groups % 4 == 0) {
    // 16 bytes of four rows at a time.
    const int group = first_group + lane % 8 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int feature = 4 * i + lane / 8, at = __shfl_sync(0xFFFFFFFF, row, feature);
      const uint4 words = load_shared_16(staged + feature * 128 + lane % 8 * 16);
      if (at >= 0 && group < groups) {
        __stcs(reinterpret_cast<uint4*>(to + uint32_t(at) * uint32_t(groups) + group), words);
      }
    }
  } else {
    const int group = first_group + lane;
#pragma unroll 1
    for (int feature = 0; feature < 16; feature++) {
      const int at = __shfl_sync(0xFFFFFFFF, row, feature);
      const uint32_t word = load_shared(staged + feature * 128 + lane * 4);
      if (at >= 0 && group < groups) to[uint32_t(at) * uint32_t(groups) + group] = word;
    }
  }
}

// Lane j of a warp brings group `group` = a multiple of 32 plus j, all lanes the same features:
// `feature` = a multiple of 16 and the 15 that follow, of each member the 8 kept values and how
// they spread over 16. `SIGNED`: Y2 may have signs, and counts by magnitude. `staged`: kStagedBytes
// of shared memory, this warp's own.
template <bool SIGNED>
__device__ __forceinline__ void write_group(const WeightOperands& out, int feature, int group,
                                            const uint4 (&y2)[4], const uint4 (&dy1)[4],
                                            const uint32_t (&spread)[4][4], uint32_t staged) {
  if (feature >= out.features) return;
  const int lane = threadIdx.x % 32;
  const uint32_t to = staged + lane * 4;
  const int row = __ldg(out.rows + feature + lane % 16);
  const uint32_t is_dense = __ballot_sync(0xFFFFFFFF, row < 0);
  uint32_t nibbles[4][2];  // of groups of 4 features
  __syncwarp();            // the last features' words have been read
#pragma unroll
  for (int g = 0; g < 4; g++) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      uint32_t y2_member[4], dy1_member[4], rank[4], kept[4], y2_words[2], dy1_words[2];
#pragma unroll
      for (int member = 0; member < 4; member++) {
        const uint32_t selector = spread[member][g] >> (16 * pair);
        y2_member[member] = permute(word_of(y2[member], g), 0, selector);
        dy1_member[member] = permute(word_of(dy1[member], g), 0, selector);
        rank[member] = __vminu2(SIGNED ? y2_member[member] & ~kSigns : y2_member[member], kNaNs);
      }
      choose_two(rank, kept);
      compress_pairs(y2_member, kept, y2_words);
      compress_pairs(dy1_member, kept, dy1_words);
      nibbles[g][pair] = nibbles_of(kept);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = (4 * g + 2 * pair + i) * 128;
        store_shared(to + at, y2_words[i]);
        store_shared(to + kStagedBytes / 2 + at, dy1_words[i]);
      }
      if (is_dense >> (4 * g + 2 * pair) & 3) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int at = ~__shfl_sync(0xFFFFFFFF, row, 4 * g + 2 * pair + i);
          if (at < 0 || !out.has(feature, group)) continue;
          const uint32_t halves = i == 0 ? 0x5410 : 0x7632;
#pragma unroll
          for (int plane = 0; plane < 2; plane++) {
            const uint32_t place =
                uint32_t(plane * out.dense_features + at) * uint32_t(out.tokens / 4) + group;
            const int m = 2 * plane;
            out.y2.dense[place] = permute(y2_member[m], y2_member[m + 1], halves);
            out.dy1.dense[place] = permute(dy1_member[m], dy1_member[m + 1], halves);
          }
        }
      }
    }
  }
  __syncwarp();
  write_rows(out, out.y2.sparse, staged, row, group - lane);
  write_rows(out, out.dy1.sparse, staged + kStagedBytes / 2, row, group - lane);

  uint32_t words[2] = {half_words(nibbles[0], nibbles[1]), half_words(nibbles[2], nibbles[3])};
  // Groups beyond T keep the legal nibble of an empty group; those beyond the last block are
  // nobody's.
  if (group >= out.tokens / 4) words[0] = words[1] = 0x44444444;
  transpose_quad(words, lane);
  if (4 * group / 64 >= out.token_blocks) return;
  // Lane q of a quad has four features of the quad's four groups, 16 tokens.
  const int4 of = __ldg(reinterpret_cast<const int4*>(out.metadata_at + feature) + lane % 4);
  const int at[4] = {of.x, of.y, of.z, of.w};
  uint16_t* metadata = out.metadata + half_word(0, group / 4 * 16, out.token_blocks);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t half = words[i / 2] >> (16 * (i % 2));
    if (at[i] >= 0) metadata[at[i]] = static_cast<uint16_t>(half);
  }
}

// Where each feature goes, from the lists of those that are dense and sparse.
static __global__ void place_features(const int* dense, const int* sparse, WeightOperands out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < out.dense_features) {
    out.rows[dense[i]] = ~i;
    out.metadata_at[dense[i]] = -1;
  } else if (i < out.features) {
    const int row = i - out.dense_features;
    out.rows[sparse[row]] = row;
    out.metadata_at[sparse[row]] = half_word(row, 0, out.token_blocks);
  }
}

using Bf16Result = xla::ffi::ResultBuffer<xla::ffi::BF16>;

inline WeightOperands weight_operands(int tokens, int features, Bf16Result& y2_sparse,
                                      Bf16Result& dy1_sparse,
                                      xla::ffi::ResultBuffer<xla::ffi::U32>& metadata,
                                      Bf16Result& y2_dense, Bf16Result& dy1_dense,
                                      xla::ffi::ResultBuffer<xla::ffi::S32>& places) {
  const auto words = [](Bf16Result& result) {
    return static_cast<uint32_t*>(result->untyped_data());
  };
  WeightOperands out = {};
  out.y2 = {words(y2_sparse), words(y2_dense)};
  out.dy1 = {words(dy1_sparse), words(dy1_dense)};
  out.metadata = reinterpret_cast<uint16_t*>(metadata->typed_data());
  out.rows = places->typed_data();
  out.metadata_at = out.rows + features;
  out.tokens = tokens;
  out.features = features;
  out.dense_features = static_cast<int>(y2_dense->dimensions()[1]);
  out.token_blocks = static_cast<int>(metadata->dimensions()[1]);
  return out;
}

// Sets what does not come with the groups: where each feature goes, and the metadata of the rows
// that pad the last 64, which belong to no feature: empty groups.
inline cudaError_t prepare(const WeightOperands& out, const int* dense, const int* sparse,
                           cudaStream_t stream) {
  const int sparse_features = out.features - out.dense_features;
  if (sparse_features % 64) {
    const int64_t block = 256 * int64_t(out.token_blocks);
    const cudaError_t error = cudaMemsetAsync(out.metadata + sparse_features / 64 * block, 0x44,
                                              block * sizeof(uint16_t), stream);
    if (error != cudaSuccess) return error;
  }
  place_features<<<(out.features + 255) / 256, 256, 0, stream>>>(dense, sparse, out);
  return cudaGetLastError();
}

}  // namespace s24jax
