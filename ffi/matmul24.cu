// matmul24: compressed A [M, K] times dense row-major B [K, N], bf16 in, float32 accumulation.
//
// Two warpgroups multiply what three threads of a third one bring: one says which piece of work is
// next (matmul24_schedule.cuh), one copies A, one copies B. The two blocks of a cluster lie below
// each other: each multiplies its own rows of A by the same columns of B, of which each copies its
// share to both. The grid is one block per multiprocessor. Read: announce, copy_a, copy_b,
// multiply, write_tile, work_on, and at last the handler.
//
// Dense rows. A dense row is the sum of two 2:4 rows: one keeps members 0 and 1 of every group, the
// other members 2 and 3. So the dense features of a weight gradient are tiles like the others,
// twice as long, whose metadata is a constant.
#include "error.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "matmul24_schedule.cuh"
#include "tensor_map.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;

// For each thread of a warpgroup. A block starts with 168 for every thread, the multiple of 8 that
// 65,536 registers allow; whoever asked for more than they leave would wait forever.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * (65536 / kThreads / 8 * 8));
constexpr uint32_t kKeepsFirstTwo = 0x44444444;  // metadata of members 0 and 1
constexpr uint32_t kKeepsLastTwo = 0xEEEEEEEE;   // of members 2 and 3

template <typename T>
struct Position {
  Cursor<T::A_STAGES> a;
  Cursor<T::B_STAGES> b;
  Cursor<kPieces> piece;
};

// Shared memory, by address.
template <typename T>
struct Shared {
  uint32_t base;

  __device__ uint32_t a(int stage) const { return base + stage * (T::A_BYTES + T::E_BYTES); }
  __device__ uint32_t metadata(int stage) const { return a(stage) + T::A_BYTES; }
  __device__ uint32_t b(int stage) const { return a(T::A_STAGES) + stage * T::B_BYTES; }
  __device__ uint32_t staging(int warp) const { return b(T::B_STAGES) + warp * kStagingBytes; }
  // Barriers, and pieces behind them.
  __device__ uint32_t full_a(int stage) const {
    return base + T::SHARED_BYTES - kBarrierBytes + stage * sizeof(uint64_t);
  }
  __device__ uint32_t empty_a(int stage) const { return full_a(T::A_STAGES + stage); }
  __device__ uint32_t full_b(int stage) const { return empty_a(T::A_STAGES + stage); }
  __device__ uint32_t empty_b(int stage) const { return full_b(T::B_STAGES + stage); }
  __device__ uint32_t full_piece(int i) const { return empty_b(T::B_STAGES + i); }
  __device__ uint32_t empty_piece(int i) const { return full_piece(kPieces + i); }
  __device__ uint32_t pieces(int i) const { return empty_piece(kPieces) + i * sizeof(Piece); }

  static_assert(2 * (T::A_STAGES + T::B_STAGES + kPieces) * sizeof(uint64_t) +
                    kPieces * sizeof(Piece) <=
                kBarrierBytes);

  __device__ Piece piece(int i) const { return load_shared_as<Piece>(pieces(i)); }
  __device__ void set_piece(int i, const Piece& piece) const { store_shared_as(pieces(i), piece); }
};

// Of a block's rows.
template <typename T>
__device__ int first_row_of(const Piece& piece, int rank) {
  return (piece.row_tile * kCluster + rank) * T::BLOCK_ROWS;
}

// The groups of 64 rows of metadata are copied together; at the bottom edge those before them come
// along instead of groups that do not exist.
template <typename T>
__device__ int first_metadata(const Arguments& arg, int row) {
  return max(0, min(row / 64, arg.metadata_rows - T::ROW_GROUPS));
}

// --------------------------------------------------------------------------------------- producers

// Tells the other warps what to work on: finding it takes a thousand cycles.
template <typename T>
__device__ void announce(const Arguments& arg, const Shared<T>& shared) {
  Schedule schedule(arg, blockIdx.x / kCluster, gridDim.x / kCluster);
  Cursor<kPieces> at;
  Piece piece;
  do {
    if (!schedule.next(piece)) piece.chunks = 0;
    barrier_wait(shared.empty_piece(at.stage), at.parity ^ 1);
    shared.set_piece(at.stage, piece);
    barrier_arrive(shared.full_piece(at.stage));
    at.advance();
  } while (piece.chunks);
}

template <typename T>
__device__ void copy_a(const Arguments& arg, const Shared<T>& shared, int rank) {
  Cursor<kPieces> at_piece;
  Cursor<T::A_STAGES> at;
  while (true) {
    barrier_wait(shared.full_piece(at_piece.stage), at_piece.parity);
    const Piece piece = shared.piece(at_piece.stage);
    if (!piece.chunks) return;
    const int row = first_row_of<T>(piece, rank);
    const int row_group = first_metadata<T>(arg, row);
    for (int i = piece.first; i < piece.last; i++) {
      const int k_block = piece.k_block(arg, i);
      const uint32_t full = shared.full_a(at.stage), to = shared.a(at.stage);
      barrier_wait(shared.empty_a(at.stage), at.parity ^ 1);
      if (piece.dense) {
        barrier_arrive_expect(full, T::A_BYTES);
        copy_box(to, &arg.a_dense, full, k_block * (kBlock / 2), row, i & 1);
      } else {
        barrier_arrive_expect(full, T::A_BYTES + T::E_BYTES);
        copy_box(shared.metadata(at.stage), &arg.metadata, full, 0, 2 * k_block, row_group);
        copy_box(to, &arg.a, full, k_block * (kBlock / 2), row, 0);
      }
      at.advance();
    }
    barrier_arrive(shared.empty_piece(at_piece.stage));
    at_piece.advance();
  }
}

// This block's share of the columns of B, to both.
template <typename T>
__device__ void copy_b(const Arguments& arg, const Shared<T>& shared, int rank) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  Cursor<kPieces> at_piece;
  Cursor<T::B_STAGES> at;
  while (true) {
    barrier_wait(shared.full_piece(at_piece.stage), at_piece.parity);
    const Piece piece = shared.piece(at_piece.stage);
    if (!piece.chunks) return;
    const int column = piece.column_tile * T::COLUMNS;
    for (int i = 2 * piece.first; i < 2 * piece.last; i++) {
      const int z = (piece.k_block(arg, i / 2) * kBlock + i % 2 * kHalf + rank * kStep) / 4;
      const uint32_t full = shared.full_b(at.stage);
      const uint32_t to = shared.b(at.stage) + rank * T::B_BYTES / kCluster;
      barrier_wait(shared.empty_b(at.stage), at.parity ^ 1);
      barrier_arrive_expect(full, piece.chunks * (T::B_BYTES / T::CHUNKS));
      // One box, where the columns are there: several small ones keep the copy engine busy longer
      // than their bytes (1.2 times the time of the product, for the tile of 256 columns).
      if (column + T::COLUMNS <= arg.n) {
        copy_box_multicast(to, &arg.b, full, kAll, 0, 0, z, column / kChunk);
      } else {
        for (int chunk = 0; chunk < piece.chunks; chunk++) {
          copy_box_multicast(to + chunk * kStep * 128, &arg.b_chunk, full, kAll,
                             column + chunk * kChunk, 0, z, 0);
        }
      }
      at.advance();
    }
    barrier_arrive(shared.empty_piece(at_piece.stage));
    at_piece.advance();
  }
}

// ---------------------------------------------------------------------------------------- consumer

template <typename T, int COLUMNS>
using Accumulator = float[T::ROW_BLOCKS][COLUMNS / 2];

template <typename T, int COLUMNS>
__device__ void zero(Accumulator<T, COLUMNS>& sums) {
#pragma unroll
  for (int i = 0; i < T::ROW_BLOCKS * COLUMNS / 2; i++)
    sums[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0;
}

// One step of 32 along K for each group of 64 rows of the warpgroup, as one group of products.
template <typename T, int COLUMNS, int HALF, int STEP>
__device__ void multiply_step(Accumulator<T, COLUMNS>& sums,
                              const uint32_t (&metadata)[T::ROW_BLOCKS], uint32_t a, uint32_t b) {
  wgmma_fence();
  const uint64_t b_step =
      descriptor(b + STEP * T::B_BYTES / kCluster, kStep * 128, 1024, kSwizzle128);
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    const uint64_t a_step =
        descriptor(a + block * 64 * kBlock + (2 * HALF + STEP) * 32, 16, 1024, kSwizzle128);
    wgmma_sparse<COLUMNS, STEP>(sums[block], a_step, b_step, metadata[block]);
  }
  wgmma_commit();
}

// Sums the stages of a piece of COLUMNS columns. What the next half of a block needs is made ready
// between the two steps of this one, while the products of the first run: the tensor cores take few
// products in advance, so that whatever stands between two halves is time in which they may idle.
template <typename T, int COLUMNS>
__device__ void multiply(Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                         const Shared<T>& shared, Position<T>& at, int rank, int warpgroup,
                         int thread) {
  const Piece piece = shared.piece(at.piece.stage);
  if (piece.first == piece.last) return;
  const int row = first_row_of<T>(piece, rank);
  uint32_t words[T::ROW_BLOCKS];  // where in a stage this thread's metadata lies
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    // Rows beyond M have zero values; any metadata does.
    const int group = min(row / 64 + warpgroup * T::ROW_BLOCKS + block, arg.metadata_rows - 1) -
                      first_metadata<T>(arg, row);
    words[block] = (group * 2 * kWords + thread) * 4;
  }
  const uint32_t a_offset = warpgroup * T::ROW_BLOCKS * 64 * kBlock;
  uint32_t metadata[2][T::ROW_BLOCKS];  // of either half
  const auto make_ready = [&](int half, int i) {
    if (half == 0) barrier_wait(shared.full_a(at.a.stage), at.a.parity);
    barrier_wait(shared.full_b(at.b.stage), at.b.parity);
#pragma unroll
    for (int block = 0; block < T::ROW_BLOCKS; block++) {
      if (piece.dense) {
        metadata[half][block] = i & 1 ? kKeepsLastTwo : kKeepsFirstTwo;
      } else {
        const uint32_t word =
            load_shared(shared.metadata(at.a.stage) + half * kWords * 4 + words[block]);
        metadata[half][block] = word ? word : kKeepsFirstTwo;  // 0 is beyond the last block of 64
      }
    }
  };
  make_ready(0, piece.first);
  uint32_t before_a = 0, before_b = 0;  // barriers of what products may still read
  for (int i = piece.first; i < piece.last; i++) {
    const uint32_t a = shared.a(at.a.stage) + a_offset;
    uint32_t b = shared.b(at.b.stage);
    multiply_step<T, COLUMNS, 0, 0>(sums, metadata[0], a, b);
    wgmma_wait<1>();
    if (before_b) {
      if (thread < kCluster) barrier_arrive_at(before_b, thread);
      if (thread == 0) barrier_arrive(before_a);
    }
    before_b = shared.empty_b(at.b.stage);
    at.b.advance();
    make_ready(1, i);
    multiply_step<T, COLUMNS, 0, 1>(sums, metadata[0], a, b);

    b = shared.b(at.b.stage);
    multiply_step<T, COLUMNS, 1, 0>(sums, metadata[1], a, b);
    wgmma_wait<1>();
    if (thread < kCluster) barrier_arrive_at(before_b, thread);
    before_a = shared.empty_a(at.a.stage);
    before_b = shared.empty_b(at.b.stage);
    at.a.advance();
    at.b.advance();
    if (i + 1 < piece.last) make_ready(0, i + 1);
    multiply_step<T, COLUMNS, 1, 1>(sums, metadata[1], a, b);
  }
  wgmma_wait<0>();
  if (thread < kCluster) barrier_arrive_at(before_b, thread);
  if (thread == 0) barrier_arrive(before_a);
}

// ------------------------------------------------------------------------------- parts of a tile

// Where a warpgroup leaves its sums of a part of a tile.
template <typename T>
__device__ float4* partial_of(const Arguments& arg, int slot, int rank, int warpgroup) {
  const int64_t floats = (int64_t(slot) * kCluster + rank) * T::PARTIAL_FLOATS;
  return reinterpret_cast<float4*>(arg.partials + floats +
                                   warpgroup * (T::PARTIAL_FLOATS / kConsumers));
}

// Leaves the sums for whichever part of the tile is done last. Whether this is the last: nobody
// ever waits, so that it does not matter which clusters run at the same time.
template <typename T, int COLUMNS>
__device__ bool leave_partial(const Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                              const Piece& piece, int rank, int warpgroup, int thread) {
  float4* to = partial_of<T>(arg, piece.slot + piece.part, rank, warpgroup) + thread;
#pragma unroll
  for (int r = 0; r < T::ROW_BLOCKS; r++) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++) {
      const float* d = &sums[r][4 * i];
      __stcg(to + (r * (COLUMNS / 8) + i) * 128, make_float4(d[0], d[1], d[2], d[3]));
    }
  }
  __threadfence();
  named_sync(1 + warpgroup, 128);
  bool last = false;
  if (thread == 0) {
    int* arrived = arg.arrived + (piece.slot * kCluster + rank) * kConsumers + warpgroup;
    last = atomicAdd(arrived, 1) == piece.parts - 1;
    __threadfence();
  }
  return named_any(1 + warpgroup, 128, last);
}

// The sums of all parts, in a fixed order, so that repeated runs agree bit for bit.
template <typename T, int COLUMNS>
__device__ void add_partials(Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                             const Piece& piece, int rank, int warpgroup, int thread) {
  zero<T, COLUMNS>(sums);
  for (int part = 0; part < piece.parts; part++) {
    const float4* from = partial_of<T>(arg, piece.slot + part, rank, warpgroup) + thread;
#pragma unroll
    for (int r = 0; r < T::ROW_BLOCKS; r++) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i++) {
        const float4 addend = __ldcg(from + (r * (COLUMNS / 8) + i) * 128);
        float* d = &sums[r][4 * i];
        d[0] += addend.x;
        d[1] += addend.y;
        d[2] += addend.z;
        d[3] += addend.w;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- epilogue

template <typename Out>
__device__ __forceinline__ void store_pair(uint32_t to, float x, float y) {
  if constexpr (sizeof(Out) == 4) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
  } else {
    store_shared(to, round_pair(x, y));
  }
}

// Writes the warp's 16 rows of each block of 64, 128 bytes of every row at a time. The 16-byte
// units of a row change places with the row, so that no two threads meet in a bank.
template <typename T, typename Out, int COLUMNS>
__device__ void write_tile(const Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                           const Piece& piece, int warp_row, int lane, uint32_t staging) {
  constexpr int kUnits = 128 / sizeof(Out);  // columns at a time
  const int rows = piece.dense ? arg.m_dense : arg.m;
  const int* places = piece.dense ? arg.dense_rows : arg.rows;
  const uint32_t to = staging + lane / 4 * 128 + (lane % 4 * 2 * sizeof(Out) ^ lane / 4 * 16);
  const uint32_t from = staging + lane / 8 * 128 + (lane % 8 * 16 ^ lane / 8 * 16);
  // Each thread writes 16 bytes of 4 rows.
  const int column = piece.column_tile * T::COLUMNS + lane % 8 * (16 / sizeof(Out));
  Out* out = static_cast<Out*>(arg.out) + column;
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    int out_row[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = warp_row + block * 64 + 4 * i + lane / 8;
      out_row[i] = row >= rows ? -1 : places ? places[row] : row;
    }
#pragma unroll
    for (int chunk = 0; chunk < COLUMNS / kUnits; chunk++) {
#pragma unroll
      for (int j = 0; j < kUnits / 8; j++) {
        const float* d = &sums[block][4 * (chunk * (kUnits / 8) + j)];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          store_pair<Out>((to ^ 8 * j * sizeof(Out)) + 8 * half * 128, d[2 * half],
                          d[2 * half + 1]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 unit = load_shared_16((from ^ i % 2 * 64) + 4 * i * 128);
        if (out_row[i] >= 0 && column + chunk * kUnits < arg.n) {
          *reinterpret_cast<uint4*>(out + int64_t(out_row[i]) * arg.n + chunk * kUnits) = unit;
        }
      }
      __syncwarp();
    }
  }
}

// One piece of at least CHUNKS chunks. Each width has its sums for itself, up to its epilogue:
// where they would meet, the compiler copies accumulators and takes the products one at a time.
template <typename T, typename Out, int CHUNKS = 1>
__device__ void work_on(int chunks, const Arguments& arg, const Shared<T>& shared, Position<T>& at,
                        int rank, int warpgroup) {
  if constexpr (CHUNKS < T::CHUNKS) {
    if (chunks > CHUNKS) {
      return work_on<T, Out, CHUNKS + 1>(chunks, arg, shared, at, rank, warpgroup);
    }
  }
  constexpr int COLUMNS = CHUNKS * kChunk;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Accumulator<T, COLUMNS> sums;
  zero<T, COLUMNS>(sums);
  multiply<T, COLUMNS>(sums, arg, shared, at, rank, warpgroup, thread);
  const Piece piece = shared.piece(at.piece.stage);  // anew: there were no registers for it
  if (piece.parts > 1) {
    if (!leave_partial<T, COLUMNS>(sums, arg, piece, rank, warpgroup, thread)) return;
    add_partials<T, COLUMNS>(sums, arg, piece, rank, warpgroup, thread);
  }
  const int first_row = first_row_of<T>(piece, rank) + warpgroup * T::ROW_BLOCKS * 64;
  write_tile<T, Out, COLUMNS>(sums, arg, piece, first_row + warp * 16, lane,
                              shared.staging(warpgroup * 4 + warp));
}

template <typename T, typename Out>
__device__ void consume(const Arguments& arg, const Shared<T>& shared, int rank, int warpgroup) {
  Position<T> at;
  while (true) {
    barrier_wait(shared.full_piece(at.piece.stage), at.piece.parity);
    const int chunks = shared.piece(at.piece.stage).chunks;
    if (chunks == 0) return;
    work_on<T, Out>(chunks, arg, shared, at, rank, warpgroup);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty_piece(at.piece.stage));
    at.piece.advance();
  }
}

// ------------------------------------------------------------------------------------------ kernel

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, 1)
    matmul24_kernel(const __grid_constant__ Arguments arg) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<T> shared{shared_address(memory)};
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::A_STAGES; stage++) {
      barrier_init(shared.full_a(stage), 1);
      barrier_init(shared.empty_a(stage), kConsumers);
    }
    for (int stage = 0; stage < T::B_STAGES; stage++) {
      barrier_init(shared.full_b(stage), 1);
      barrier_init(shared.empty_b(stage), kConsumers * kCluster);
    }
    for (int i = 0; i < kPieces; i++) {
      barrier_init(shared.full_piece(i), 1);
      barrier_init(shared.empty_piece(i), 2 + kConsumers * 4);  // who reads it: two threads, warps
    }
    barrier_init_fence();
    prefetch_map(&arg.a);
    prefetch_map(&arg.b);
  }
  cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) announce<T>(arg, shared);
    if (threadIdx.x == 32) copy_a<T>(arg, shared, rank);
    if (threadIdx.x == 64) copy_b<T>(arg, shared, rank);
    __syncwarp();  // a warp arrives at the cluster's barrier as one
  } else {
    raise_registers<kConsumerRegisters>();
    consume<T, Out>(arg, shared, rank, warpgroup - 1);
  }
  cluster_sync();  // no block leaves while another may still copy into it or arrive at it
}

// ----------------------------------------------------------------------------------------- handler

struct Matrices {
  ffi::Buffer<ffi::BF16> values;
  ffi::Buffer<ffi::U32> metadata;
  ffi::Buffer<ffi::BF16> dense, b;
};

template <typename T, typename Out>
ffi::Error launch(cudaStream_t stream, Arguments arg, const Matrices& in, bool strided,
                  uint8_t* workspace, size_t workspace_bytes) {
  int blocks;
  const auto kernel = matmul24_kernel<T, Out>;
  cudaError_t error = most_blocks(kernel, kCluster, T::SHARED_BYTES, &blocks);
  if (error != cudaSuccess) return status("matmul24", error);

  const int64_t k = in.b.dimensions()[0], kept = k / 2, n = arg.n;
  const int64_t member = strided ? k / 4 * n : n, group = strided ? n : 4 * n;
  const int64_t metadata_columns = in.metadata.dimensions()[1];
  const bool mapped =
      map_tensor(&arg.a, in.values.untyped_data(), 2, {kept, arg.m, 1}, {kept, kept * arg.m},
                 {kBlock / 2, T::BLOCK_ROWS, 1}, CU_TENSOR_MAP_SWIZZLE_128B) &&
      (arg.m_dense == 0 ||
       map_tensor(&arg.a_dense, in.dense.untyped_data(), 2, {kept, arg.m_dense, 2},
                  {kept, kept * arg.m_dense}, {kBlock / 2, T::BLOCK_ROWS, 1},
                  CU_TENSOR_MAP_SWIZZLE_128B)) &&
      map_tensor(&arg.metadata, in.metadata.untyped_data(), 4,
                 {kWords, metadata_columns, arg.metadata_rows}, {kWords, kWords * metadata_columns},
                 {kWords, 2, T::ROW_GROUPS}, CU_TENSOR_MAP_SWIZZLE_NONE) &&
      map_tensor<4>(&arg.b, in.b.untyped_data(), 2,
                    {kChunk, 4, k / 4, std::max<int64_t>(1, n / kChunk)}, {member, group, kChunk},
                    {kChunk, 4, kStep / 4, T::CHUNKS}, CU_TENSOR_MAP_SWIZZLE_128B) &&
      map_tensor<4>(&arg.b_chunk, in.b.untyped_data(), 2, {n, 4, k / 4, 1}, {member, group, kChunk},
                    {kChunk, 4, kStep / 4, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!mapped) return failed("matmul24", "cuTensorMapEncodeTiled refused an operand");

  // Each partial sum has counters, of which those of a tile's first are in use.
  constexpr size_t kPartialBytes = kCluster * T::PARTIAL_FLOATS * sizeof(float);
  constexpr size_t kCounterBytes = kCluster * kConsumers * sizeof(int);
  const size_t most = workspace_bytes / (kPartialBytes + kCounterBytes);
  const size_t partials = divide<T>(arg, blocks / kCluster, static_cast<int>(most));
  arg.partials = reinterpret_cast<float*>(workspace);
  arg.arrived = reinterpret_cast<int*>(workspace + partials * kPartialBytes);
  if (partials) {
    error = cudaMemsetAsync(arg.arrived, 0, partials * kCounterBytes, stream);
    if (error != cudaSuccess) return status("matmul24", error);
  }

  return status("matmul24", launch_clusters(kernel, kCluster, blocks, kThreads, T::SHARED_BYTES,
                                            stream, arg));
}

template <typename T>
ffi::Error launch_typed(cudaStream_t stream, const Arguments& arg, const Matrices& in, bool strided,
                        ffi::AnyBuffer out, ffi::ResultBuffer<ffi::U8>& workspace) {
  uint8_t* bytes = workspace->typed_data();
  return out.element_type() == ffi::DataType::F32
             ? launch<T, float>(stream, arg, in, strided, bytes, workspace->size_bytes())
             : launch<T, __nv_bfloat16>(stream, arg, in, strided, bytes, workspace->size_bytes());
}

const int* data_or_null(const ffi::Buffer<ffi::S32>& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Names of tiles: see s24jax/ops/matmul24/tuning.py.
ffi::Error matmul24(cudaStream_t stream, ffi::Buffer<ffi::BF16> values,
                    ffi::Buffer<ffi::U32> metadata, ffi::Buffer<ffi::BF16> dense,
                    ffi::Buffer<ffi::BF16> b, ffi::Buffer<ffi::S32> rows,
                    ffi::Buffer<ffi::S32> dense_rows, ffi::Buffer<ffi::S32> k_lists,
                    ffi::Buffer<ffi::S32> k_counts, ffi::Result<ffi::AnyBuffer> out,
                    ffi::ResultBuffer<ffi::U8> workspace, int32_t tile, int32_t group,
                    int32_t strided) {
  const Matrices in{values, metadata, dense, b};
  Arguments arg = {};
  arg.rows = data_or_null(rows);
  arg.dense_rows = data_or_null(dense_rows);
  arg.k_lists = data_or_null(k_lists);
  arg.k_counts = data_or_null(k_counts);
  arg.out = out->untyped_data();
  arg.m = static_cast<int>(values.dimensions()[0]);
  arg.m_dense = dense.element_count() ? static_cast<int>(dense.dimensions()[1]) : 0;
  arg.n = static_cast<int>(b.dimensions()[1]);
  arg.metadata_rows = static_cast<int>(metadata.dimensions()[0]);
  arg.k_blocks = static_cast<int>(metadata.dimensions()[1] + 1) / 2;
  arg.group = group;
  switch (tile) {
    case 0:
      return launch_typed<Tile<2, 192>>(stream, arg, in, strided, *out, workspace);
    case 1:
      return launch_typed<Tile<1, 256>>(stream, arg, in, strided, *out, workspace);
    default:
      return failed("matmul24", "no such tile");
  }
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_matmul24, s24jax::matmul24,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()   // metadata
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // dense
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // b
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // rows
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // dense_rows
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // k_lists
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // k_counts
                                  .Ret<xla::ffi::AnyBuffer>()               // out
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()    // workspace
                                  .Attr<int32_t>("tile")
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("strided"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
