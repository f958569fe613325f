// A dense product A [M, K] * B [N, K]^T whose tiles are handed to an epilogue, rounded to bf16, in
// shared memory. So Y1 and dY2 are never in memory, whatever the FFN makes of them.
//
// Two warpgroups multiply. Of a third one, one warp copies what they multiply, and three run the
// epilogue of a tile while the others are at the next. The two blocks of a cluster lie below each
// other: each multiplies its own rows of A by the same rows of B, of which each copies its half to
// both. The grid is one block per multiprocessor. Where few tiles are left for the last wave they
// are cut into narrow ones, so that the others do not wait long. Read: produce, multiply, hand_over,
// finish.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activation.cuh"
#include "error.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax::dense_matmul {

constexpr int kRows = 128, kColumns = 256;  // of a block's tile
constexpr int kNarrow = 64;                 // columns of the tiles at the end
constexpr int kDepth = 64;                  // positions along K of a stage
constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups that multiply, 64 rows each
// A product of 256 columns needs 154 registers a thread, so that no fourth warpgroup finds room.
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kEpilogueWarps = 3;
constexpr int kStages = 3;
constexpr int kABytes = kRows * kDepth * 2, kBBytes = kColumns * kDepth * 2;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kTileBytes = kRows * kColumns * 2;
constexpr int kBarrierBytes = 1024;  // so that all behind them is aligned as the swizzle wants it

// A tile lies in shared memory as panels of [128 rows][64 columns], 128 bytes a row, whose 16-byte
// units change places with the row: unit u of row r is at u ^ r % 8.
constexpr int kPanelColumns = 64;
constexpr int kPanelBytes = kRows * kPanelColumns * 2;

__device__ __forceinline__ uint32_t unit_of(uint32_t tile, uint32_t row, uint32_t column) {
  return tile + column / kPanelColumns * kPanelBytes + row * 128 +
         ((column % kPanelColumns / 8) ^ (row % 8)) * 16;
}

struct Arguments {
  CUtensorMap a;  // as (k, y, z): a tile's rows are `box_y` of y and the whole of z
  CUtensorMap b, b_narrow;
  int box_y;
  int row_tiles, column_tiles;  // of a cluster
  int wide_tiles;               // how many are not cut
  int k_blocks;
  int group;  // row tiles that are walked together, so that they share B in the L2 cache
};

struct Tile {
  int row;  // in tiles of a block
  int first_column, columns;

  __device__ int first_row() const { return row * kRows; }
};

// The tiles of a block: of each wave one.
class Walk {
 public:
  __device__ explicit Walk(const Arguments& arguments)
      : arg_(arguments), next_(blockIdx.x / kCluster), rank_(cluster_rank()) {}

  __device__ bool next(Tile& tile) {
    constexpr int kCut = kColumns / kNarrow;
    const int narrow = next_ - arg_.wide_tiles;
    const int index = narrow < 0 ? next_ : arg_.wide_tiles + narrow / kCut;
    if (index >= arg_.row_tiles * arg_.column_tiles) return false;
    const int in_group = arg_.group * arg_.column_tiles;
    const int first_row = index / in_group * arg_.group;
    const int group = min(arg_.group, arg_.row_tiles - first_row);
    tile.row = (first_row + index % in_group % group) * kCluster + rank_;
    tile.first_column = index % in_group / group * kColumns;
    tile.columns = kColumns;
    if (narrow >= 0) {
      tile.first_column += narrow % kCut * kNarrow;
      tile.columns = kNarrow;
    }
    next_ += gridDim.x / kCluster;
    return true;
  }

 private:
  const Arguments& arg_;
  int next_;
  const int rank_;
};

// Shared memory, by address: barriers, stages, the tile, the epilogue's own.
struct Shared {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + stage * sizeof(uint64_t); }
  __device__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ uint32_t full_tile() const { return empty(kStages); }
  __device__ uint32_t empty_tile() const { return full_tile() + sizeof(uint64_t); }
  __device__ uint32_t a(int stage) const { return base + kBarrierBytes + stage * kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + kABytes; }
  __device__ uint32_t tile() const { return a(kStages); }
  __device__ uint32_t scratch() const { return tile() + kTileBytes; }

  static_assert((2 * kStages + 2) * sizeof(uint64_t) <= kBarrierBytes);
};

template <typename Epilogue>
constexpr int kSharedBytes =
    kBarrierBytes + kStages * kStageBytes + kTileBytes + Epilogue::kScratchBytes;

// --------------------------------------------------------------------------------------- producer

__device__ inline void produce(const Arguments& arg, const Shared& shared) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  const int rank = cluster_rank();
  Cursor<kStages> at;
  Walk walk(arg);
  Tile tile;
  while (walk.next(tile)) {
    const CUtensorMap* b = tile.columns == kColumns ? &arg.b : &arg.b_narrow;
    const int share = tile.columns / kCluster;
    for (int i = 0; i < arg.k_blocks; i++) {
      const uint32_t full = shared.full(at.stage);
      barrier_wait(shared.empty(at.stage), at.parity ^ 1);
      barrier_arrive_expect(full, kABytes + tile.columns * kDepth * 2);
      copy_box(shared.a(at.stage), &arg.a, full, i * kDepth, tile.row * arg.box_y, 0);
      copy_box_multicast(shared.b(at.stage) + rank * share * kDepth * 2, b, full, kAll, i * kDepth,
                         tile.first_column + rank * share, 0, 0);
      at.advance();
    }
  }
}

// --------------------------------------------------------------------------------------- consumers

// Descriptors of K-major operands whose rows of 128 bytes are swizzled; those of another address
// differ in the lower half alone. Made once: between two stages there are few cycles to spare.
struct Operand {
  uint32_t low;

  __device__ explicit Operand(uint32_t address)
      : low(static_cast<uint32_t>(descriptor(address, 16, 1024, kSwizzle128))) {}
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    constexpr uint64_t kHigh = uint64_t(1024 >> 4) << 32 | uint64_t(kSwizzle128) << 62;
    return kHigh | (low + offset / 16);
  }
};

template <int COLUMNS>
__device__ __forceinline__ void multiply(float (&sums)[COLUMNS / 2], const Arguments& arg,
                                         const Shared& shared, const Operand& a, const Operand& b,
                                         Cursor<kStages>& at, int thread) {
  uint32_t before = 0;  // the barrier of what products may still read
#pragma unroll 1
  for (int i = 0; i < arg.k_blocks; i++) {
    barrier_wait(shared.full(at.stage), at.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepth / 16; step++) {
      const uint32_t offset = at.stage * kStageBytes + step * 32;
      wgmma_dense<COLUMNS>(sums, a.at(offset), b.at(offset), i + step);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (before && thread < kCluster) barrier_arrive_at(before, thread);
    before = shared.empty(at.stage);
    at.advance();
  }
  wgmma_wait<0>();
  if (before && thread < kCluster) barrier_arrive_at(before, thread);
}

// Rounds the sums into the tile.
template <int COLUMNS>
__device__ __forceinline__ void hand_over(const float (&sums)[COLUMNS / 2], uint32_t tile,
                                          int first_row, int lane) {
  const int row = first_row + lane / 4;
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = round_pair(sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
      store_shared(unit_of(tile, row + 8 * half, 8 * i) + lane % 4 * 4, pair);
    }
  }
}

__device__ inline void consume(const Arguments& arg, const Shared& shared, int warpgroup) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const Operand a(shared.a(0) + warpgroup * 64 * kDepth * 2), b(shared.b(0));
  Cursor<kStages> at;
  Cursor<1> at_tile;
  const auto work_on = [&](auto columns) {
    constexpr int kCount = decltype(columns)::value;
    float sums[kCount / 2];
    multiply<kCount>(sums, arg, shared, a, b, at, thread);
    barrier_wait(shared.empty_tile(), at_tile.parity ^ 1);
    hand_over<kCount>(sums, shared.tile(), warpgroup * 64 + thread / 32 * 16, lane);
    barrier_arrive(shared.full_tile());
    at_tile.advance();
  };
  Walk walk(arg);
  Tile tile;
  bool more = walk.next(tile);
  // One loop after the other: with both kinds of tile in one the compiler runs out of registers.
  for (; more && tile.columns == kColumns; more = walk.next(tile)) {
    work_on(std::integral_constant<int, kColumns>());
  }
  for (; more; more = walk.next(tile)) work_on(std::integral_constant<int, kNarrow>());
}

// ---------------------------------------------------------------------------------------- epilogue

// An epilogue is what its kernel needs to know, how much shared memory of its own it wants, and a
// type Run: each thread of its warps makes one and calls `finish(tile)` for each tile.
template <typename Epilogue>
__device__ void finish(const Arguments& arg, const Epilogue& epilogue, const Shared& shared,
                       int warp) {
  typename Epilogue::Run run(epilogue, shared.tile(), shared.scratch(), warp);
  Cursor<1> at_tile;
  Walk walk(arg);
  Tile tile;
  while (walk.next(tile)) {
    barrier_wait(shared.full_tile(), at_tile.parity);
    run.finish(tile);
    barrier_arrive(shared.empty_tile());
    at_tile.advance();
  }
}

// ------------------------------------------------------------------------------------------ kernel

template <typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    dense_matmul_kernel(const __grid_constant__ Arguments arg,
                        const __grid_constant__ Epilogue epilogue) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared shared{shared_address(memory)};
  asm volatile("" : "+r"(shared.base));  // a register: the compiler made it anew for every stage
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kConsumers * kCluster);
    }
    barrier_init(shared.full_tile(), kConsumers * 128);
    barrier_init(shared.empty_tile(), kEpilogueWarps * 32);
    barrier_init_fence();
    prefetch_map(&arg.a);
    prefetch_map(&arg.b);
  }
  cluster_sync();
  // From one lane, so that the compiler knows that a warp's threads agree.
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), warpgroup = warp / 4;
  if (warpgroup > 0) {
    consume(arg, shared, warpgroup - 1);
  } else if (warp > 0) {
    finish(arg, epilogue, shared, warp - 1);
  } else {
    if (threadIdx.x == 0) produce(arg, shared);
    __syncwarp();  // a warp arrives at the cluster's barrier as one
  }
  cluster_sync();  // no block leaves while another may still copy into it or arrive at it
}

// ------------------------------------------------------------------------------------------ launch

// Which tokens are a tile's rows, as (y, z).
struct Rows {
  int64_t y, z;  // tokens along each
  int64_t y_stride, z_stride;
  int box_y;
};

// As they are.
inline Rows natural_rows(int64_t tokens) { return {tokens, 1, 1, tokens, kRows}; }

// Member m of group g is row 32m + g of a tile.
inline Rows grouped_rows(int64_t tokens, bool strided) {
  const int64_t groups = tokens / 4;
  return {groups, 4, strided ? 1 : 4, strided ? groups : 1, kRows / 4};
}

// Launches A [M, K] * B [N, K]^T with this epilogue.
template <typename Epilogue>
xla::ffi::Error launch(const char* op, cudaStream_t stream,
                       const xla::ffi::Buffer<xla::ffi::BF16>& a,
                       const xla::ffi::Buffer<xla::ffi::BF16>& b, const Rows& rows, int group,
                       const Epilogue& epilogue) {
  const int64_t n = b.dimensions()[0], k = b.dimensions()[1];
  Arguments arg = {};
  const auto map_b = [&](CUtensorMap* map, int columns) {
    return map_tensor<4>(map, b.untyped_data(), 2, {k, n, 1, 1}, {k, k * n, k * n},
                         {kDepth, columns / kCluster, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (!map_tensor(&arg.a, a.untyped_data(), 2, {k, rows.y, rows.z},
                  {k * rows.y_stride, k * rows.z_stride},
                  {kDepth, rows.box_y, kRows / rows.box_y}, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !map_b(&arg.b, kColumns) || !map_b(&arg.b_narrow, kNarrow)) {
    return failed(op, "cuTensorMapEncodeTiled refused an operand");
  }
  const auto parts = [](int64_t size, int of) { return static_cast<int>((size + of - 1) / of); };
  arg.box_y = rows.box_y;
  arg.row_tiles = parts(rows.y, rows.box_y * kCluster);
  arg.column_tiles = parts(n, kColumns);
  arg.k_blocks = parts(k, kDepth);
  arg.group = group;

  int blocks;
  const auto kernel = dense_matmul_kernel<Epilogue>;
  const cudaError_t error = most_blocks(kernel, kCluster, kSharedBytes<Epilogue>, &blocks);
  if (error != cudaSuccess) return status(op, error);
  const int tiles = arg.row_tiles * arg.column_tiles, clusters = blocks / kCluster;
  const int rest = tiles % clusters;
  // More would not run side by side; and each takes a third of a wide one's time, not a quarter.
  const bool cut = rest * (kColumns / kNarrow) <= clusters;
  arg.wide_tiles = cut ? tiles - rest : tiles;
  const int pieces = arg.wide_tiles + (tiles - arg.wide_tiles) * (kColumns / kNarrow);
  blocks = std::min(clusters, pieces) * kCluster;
  return status(op, launch_clusters(kernel, kCluster, blocks, kThreads, kSharedBytes<Epilogue>,
                                    stream, arg, epilogue));
}

}  // namespace s24jax::dense_matmul
