// The Hopper instructions that the kernels use, one small function each.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace s24jax {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two bf16 a word, `x` in the low half.
__device__ __forceinline__ uint32_t round_pair(float x, float y) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(x, y));
  return reinterpret_cast<const uint32_t&>(pair);
}

// ---------------------------------------------------------------------------------------- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// ---------------------------------------------------------------------------------------- mbarrier

// A position in a ring of stages, and the parity of its barriers there.
template <int STAGES>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives on the barrier at the same place in block `rank` of the cluster. Without
// `.release.cluster`: that puts a MEMBAR.GPU before each arrival (it halved the sparse product's
// rate), and there is nothing to release where all that was done with a stage is to read it.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from)
               : "memory");
  return words;
}

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// A struct whose size is a multiple of 16 bytes.
template <typename V>
__device__ __forceinline__ V load_shared_as(uint32_t from) {
  static_assert(sizeof(V) % 16 == 0);
  union {
    V value;
    uint4 units[sizeof(V) / 16];
  } copy;
#pragma unroll
  for (int i = 0; i < sizeof(V) / 16; i++) copy.units[i] = load_shared_16(from + 16 * i);
  return copy.value;
}

template <typename V>
__device__ __forceinline__ void store_shared_as(uint32_t to, const V& value) {
  static_assert(sizeof(V) % 16 == 0);
  union {
    V value;
    uint4 units[sizeof(V) / 16];
  } copy = {value};
#pragma unroll
  for (int i = 0; i < sizeof(V) / 16; i++) store_shared_16(to + 16 * i, copy.units[i]);
}

// A named barrier among `threads` threads of the block.
__device__ __forceinline__ void named_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The same; whether any of the threads came with `said`.
__device__ __forceinline__ bool named_any(int name, int threads, bool said) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred said, any;\n"
      "setp.ne.u32 said, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, said;\n"
      "selp.u32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(name), "r"(threads), "r"(uint32_t(said))
      : "memory");
  return any;
}

// ------------------------------------------------------------------------------------- copy engine

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// To the same place in every block of the cluster that has its bit in `mask`.
__device__ __forceinline__ void copy_box_multicast(uint32_t to, const CUtensorMap* map,
                                                   uint32_t barrier, uint16_t mask, int x, int y,
                                                   int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(mask), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// ------------------------------------------------------------------------------------------- wgmma

template <int REGISTERS>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// How an operand lies in shared memory. Offsets in bytes; PTX ISA, "Matrix descriptor format".
enum Swizzle : uint64_t { kSwizzle128 = 1 };

__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                               Swizzle swizzle) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | swizzle << 62;
}

// The asm operands of an accumulator: "%0, ... %127" and the registers that they name.
#define S24_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define S24_NAMES_30 S24_TEN() S24_TEN(1) S24_TEN(2)
#define S24_NAMES_60 S24_NAMES_30 S24_TEN(3) S24_TEN(4) S24_TEN(5)
#define S24_NAMES_90 S24_NAMES_60 S24_TEN(6) S24_TEN(7) S24_TEN(8)
#define S24_NAMES_120 S24_NAMES_90 S24_TEN(9) S24_TEN(10) S24_TEN(11)
#define S24_NAMES_32 S24_NAMES_30 "%30, %31"
#define S24_NAMES_64 S24_NAMES_60 "%60, %61, %62, %63"
#define S24_NAMES_96 S24_NAMES_90 "%90, %91, %92, %93, %94, %95"
#define S24_NAMES_128 S24_NAMES_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define S24_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define S24_SIXTEEN(d, i) \
  S24_FOUR(d, i), S24_FOUR(d, i + 4), S24_FOUR(d, i + 8), S24_FOUR(d, i + 12)
#define S24_REGISTERS_32(d) S24_SIXTEEN(d, 0), S24_SIXTEEN(d, 16)
#define S24_REGISTERS_64(d) S24_REGISTERS_32(d), S24_SIXTEEN(d, 32), S24_SIXTEEN(d, 48)
#define S24_REGISTERS_96(d) S24_REGISTERS_64(d), S24_SIXTEEN(d, 64), S24_SIXTEEN(d, 80)
#define S24_REGISTERS_128(d) S24_REGISTERS_96(d), S24_SIXTEEN(d, 96), S24_SIXTEEN(d, 112)

#define S24_WGMMA_SPARSE(N, REGISTERS, A, B, E, S) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n" \
      "wgmma.mma_async.sp.sync.aligned.m64n" #N \
      "k32.f32.bf16.bf16 " \
      "{" S24_NAMES_##REGISTERS "}, " A ", " B ", " E ", " S ", add, 1, 1, 0, 1;\n}" \
      : S24_REGISTERS_##REGISTERS(d) \
      : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR))

// D[64, N] += A[64, 32] * B[32, N]: bf16, A 2:4 sparse along K and K-major, B N-major, float32
// accumulation. SELECTOR says which threads of a quad supply the metadata. PTX ISA,
// "wgmma.mma_async.sp".
template <int N, int SELECTOR>
__device__ __forceinline__ void wgmma_sparse(float (&d)[N / 2], uint64_t a, uint64_t b,
                                             uint32_t metadata) {
  if constexpr (N == 64) {
    S24_WGMMA_SPARSE(64, 32, "%32", "%33", "%34", "%35");
  } else if constexpr (N == 128) {
    S24_WGMMA_SPARSE(128, 64, "%64", "%65", "%66", "%67");
  } else if constexpr (N == 192) {
    S24_WGMMA_SPARSE(192, 96, "%96", "%97", "%98", "%99");
  } else {
    static_assert(N == 256);
    S24_WGMMA_SPARSE(256, 128, "%128", "%129", "%130", "%131");
  }
}

#define S24_WGMMA_DENSE(N, REGISTERS, A, B, ADD) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N \
      "k16.f32.bf16.bf16 " \
      "{" S24_NAMES_##REGISTERS "}, " A ", " B ", add, 1, 1, 0, 0;\n}" \
      : S24_REGISTERS_##REGISTERS(d) \
      : "l"(a), "l"(b), "r"(add))

// D[64, N] = A[64, 16] * B[N, 16]^T, plus D where `add` is not 0: bf16, both K-major, float32
// accumulation. PTX ISA, "wgmma.mma_async".
template <int N>
__device__ __forceinline__ void wgmma_dense(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  if constexpr (N == 64) {
    S24_WGMMA_DENSE(64, 32, "%32", "%33", "%34");
  } else {
    static_assert(N == 256);
    S24_WGMMA_DENSE(256, 128, "%128", "%129", "%130");
  }
}

}  // namespace s24jax
