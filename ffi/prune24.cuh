// The choice of two in four and their nibble, for two groups at a time: words hold 16 bits of each.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace s24jax {

__device__ __forceinline__ uint32_t word_of(const uint4& unit, int i) {
  return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w;
}

// The instruction itself: `__byte_perm` masks the selector first.
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(selector));
  return result;
}

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

// Masks of the two largest of four ranks of 15 bits: kept is who beats two of the other three, and
// the earlier of two equal ones beats the later. With 15 bits a difference's sign bit tells who is
// larger. To compare bf16 by `set.ge` takes fewer instructions and more time.
__device__ __forceinline__ void choose_two(const uint32_t (&rank)[4], uint32_t (&kept)[4]) {
  const uint32_t r0 = rank[0] | kSigns, r1 = rank[1] | kSigns, r2 = rank[2] | kSigns;
  const uint32_t b01 = r0 - rank[1], b02 = r0 - rank[2], b03 = r0 - rank[3];
  const uint32_t b12 = r1 - rank[2], b13 = r1 - rank[3], b23 = r2 - rank[3];
  kept[0] = mask_of_signs(majority(b01, b02, b03));
  kept[1] = mask_of_signs(majority(~b01, b12, b13));
  kept[2] = mask_of_signs(majority(~b02, ~b12, b23));
  kept[3] = mask_of_signs(majority(~b03, ~b13, ~b23));
}

__device__ __forceinline__ uint32_t first_kept(const uint32_t (&member)[4],
                                               const uint32_t (&kept)[4]) {
  return select(kept[0], member[0], select(kept[1], member[1], member[2]));
}

__device__ __forceinline__ uint32_t second_kept(const uint32_t (&member)[4],
                                                const uint32_t (&kept)[4]) {
  return select(kept[3], member[3], select(kept[2], member[2], member[1]));
}

// The nibble i0 | i1 << 2 of each group, four times in its half.
__device__ __forceinline__ uint32_t nibbles_of(const uint32_t (&kept)[4]) {
  const uint32_t i0 = ~kept[0] & (kept[1] ^ 0xEEEEEEEE);  // 1 if member 1, else 2
  const uint32_t i1 = kept[3] | (kept[2] ^ 0x44444444);   // 3 if member 3, else 2 or 1
  return select(0x33333333, i0, i1);
}

}  // namespace s24jax
