// From 16 features of a group of four tokens, token-wise compressed Y2 and dY1 under one mask, to
// the operands of the two weight gradients: sparse features pruned 2:4 in the group and compressed,
// dense features as they are.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hopper.cuh"
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
  int tokens, features, dense_features;
  int token_blocks;  // of 64: columns of the metadata

  __device__ __forceinline__ bool has(int feature, int group) const {
    return feature < features && group < tokens / 4;
  }

  // Of 16 features.
  __device__ __forceinline__ void load_rows(int feature, int4 (&of)[4]) const {
#pragma unroll
    for (int g = 0; g < 4; g++) {
      const auto* from = reinterpret_cast<const int4*>(rows + feature) + g;
      of[g] = feature < features ? __ldg(from) : int4{};
    }
  }
};

// Which half-word holds the nibbles of 16 positions along K (s24jax/compressed.py). Unsigned, so
// that to divide is to shift: an epilogue's warp runs alone, and waits for each instruction.
__device__ __forceinline__ uint32_t half_word(uint32_t row, uint32_t k, uint32_t k_blocks) {
  const uint32_t word = row % 64 / 16 * 32 + row % 8 * 4 + k % 64 / 16;
  return ((row / 64 * k_blocks + k / 64) * 128 + word) * 2 + row % 16 / 8;
}

__device__ __forceinline__ uint32_t word_of(const uint4& unit, int i) {
  return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w;
}

__device__ __forceinline__ int row_of(const int4& rows, int i) {
  return i == 0 ? rows.x : i == 1 ? rows.y : i == 2 ? rows.z : rows.w;
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

// Lane j of a warp brings group `group` = a multiple of 32 plus j, all lanes the same features:
// `feature` = a multiple of 16 and the 15 that follow, of each member the 8 kept values and the
// nibbles, and the features' rows. So the 32 groups of a feature, 128 bytes of its row, are written
// at once, wherever the split puts that row. `spreads`: `spread_of` each nibble, in shared memory.
__device__ __forceinline__ void write_group(const WeightOperands& out, int feature, int group,
                                            const uint4 (&y2)[4], const uint4 (&dy1)[4],
                                            const uint32_t (&token_nibbles)[4],
                                            const int4 (&rows)[4], const uint32_t* spreads) {
  const int lane = threadIdx.x % 32;
  const bool inside = out.has(feature, group);
  // Of 8 features each: the even ones in the low half, the odd ones in the high half.
  uint32_t nibbles[2] = {};
  const uint32_t row_words = out.tokens / 4;
#pragma unroll
  for (int g = 0; g < 4; g++) {  // groups of 4 features
    uint32_t spread[4];
#pragma unroll
    for (int member = 0; member < 4; member++) {
      spread[member] = spreads[token_nibbles[member] >> (4 * g) & 0xF];
    }
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
        const int row = row_of(rows[g], 2 * pair + i);
        if (row >= 0) {
          const uint32_t to = row * row_words + group;
          out.y2.sparse[to] = y2_words[i];
          out.dy1.sparse[to] = dy1_words[i];
        } else {
          const uint32_t halves = i == 0 ? 0x5410 : 0x7632;
#pragma unroll
          for (int plane = 0; plane < 2; plane++) {
            const uint32_t to = (plane * out.dense_features + ~row) * row_words + group;
            const int m = 2 * plane;
            out.y2.dense[to] = permute(y2_member[m], y2_member[m + 1], halves);
            out.dy1.dense[to] = permute(dy1_member[m], dy1_member[m + 1], halves);
          }
        }
      }
    }
  }
  // Groups beyond T keep the legal nibble of an empty group; those beyond the last block are
  // nobody's.
  if (group >= out.tokens / 4) nibbles[0] = nibbles[1] = 0x44444444;
  // Lane q of a quad takes the four features of half-word q, of the quad's four groups.
  const uint64_t of_quad = transpose_quad(uint64_t(nibbles[1]) << 32 | nibbles[0], lane);
  if (feature >= out.features || 4 * group / 64 >= out.token_blocks) return;
  const bool second = lane % 4 / 2, odd = lane % 2;  // of the halves of 8; of the pairs
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t half = 0;
#pragma unroll
    for (int member = 0; member < 4; member++) {
      half |= static_cast<uint32_t>(of_quad >> (16 * member + 4 * i) & 0xF) << (4 * member);
    }
    const int4 four = second ? rows[2 + i / 2] : rows[i / 2];
    const int row = odd ? row_of(four, i % 2 * 2 + 1) : row_of(four, i % 2 * 2);
    if (row >= 0) {
      out.metadata[half_word(row, group / 4 * 16, out.token_blocks)] = static_cast<uint16_t>(half);
    }
  }
}

// Where each feature goes, from the lists of those that are dense and sparse.
static __global__ void place_features(const int* dense, const int* sparse, int dense_features,
                               int features, int* rows) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < dense_features) {
    rows[dense[i]] = ~i;
  } else if (i < features) {
    rows[sparse[i - dense_features]] = i - dense_features;
  }
}

using Bf16Result = xla::ffi::ResultBuffer<xla::ffi::BF16>;

inline WeightOperands weight_operands(int tokens, int features, Bf16Result& y2_sparse,
                                      Bf16Result& dy1_sparse,
                                      xla::ffi::ResultBuffer<xla::ffi::U32>& metadata,
                                      Bf16Result& y2_dense, Bf16Result& dy1_dense,
                                      xla::ffi::ResultBuffer<xla::ffi::S32>& rows) {
  const auto words = [](Bf16Result& result) {
    return static_cast<uint32_t*>(result->untyped_data());
  };
  WeightOperands out = {};
  out.y2 = {words(y2_sparse), words(y2_dense)};
  out.dy1 = {words(dy1_sparse), words(dy1_dense)};
  out.metadata = reinterpret_cast<uint16_t*>(metadata->typed_data());
  out.rows = rows->typed_data();
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
  place_features<<<(out.features + 255) / 256, 256, 0, stream>>>(
      dense, sparse, out.dense_features, out.features, out.rows);
  return cudaGetLastError();
}

}  // namespace s24jax
