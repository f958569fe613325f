// matmul24: compressed A [M, K] times dense row-major B [K, N], bf16 in, float32 accumulation.
//
// One warpgroup copies (thread 0 of it), two multiply. The two blocks of a cluster lie below each
// other: each multiplies its own rows of A by the same columns of B, of which each copies its share
// to all. The grid is one block per multiprocessor; each cluster walks its own list of pieces of
// work (matmul24_schedule.cuh). Read: produce, multiply, write_tile, work_on, and at last the
// handler.
//
// Dense rows. A dense row is the sum of two 2:4 rows: one keeps members 0 and 1 of every group, the
// other members 2 and 3. So the dense features of a weight gradient are tiles like the others,
// twice as long, whose metadata is a constant.
#include "error.cuh"
#include "hopper.cuh"
#include "matmul24_schedule.cuh"
#include "tensor_map.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;

// Of the 65,536 registers of a multiprocessor, for each thread of a warpgroup.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr uint32_t kKeepsFirstTwo = 0x44444444;  // metadata of members 0 and 1
constexpr uint32_t kKeepsLastTwo = 0xEEEEEEEE;   // of members 2 and 3

// A position in the ring of stages.
template <typename T>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == T::STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Shared memory, by address.
template <typename T>
struct Shared {
  uint32_t base;

  __device__ uint32_t a(int stage) const { return base + stage * T::STAGE_BYTES; }
  __device__ uint32_t b(int stage) const { return a(stage) + T::A_BYTES; }
  __device__ uint32_t metadata(int stage) const { return b(stage) + T::B_BYTES; }
  __device__ uint32_t staging(int warp) const { return a(T::STAGES) + warp * kStagingBytes; }
  __device__ uint32_t full(int stage) const {
    return base + T::SHARED_BYTES - kBarrierBytes + stage * sizeof(uint64_t);
  }
  __device__ uint32_t empty(int stage) const { return full(T::STAGES + stage); }
};

// The groups of 64 rows of metadata are copied together; at the bottom edge those before them come
// along instead of groups that do not exist.
template <typename T>
__device__ int first_metadata(const Arguments& arg, int row) {
  return max(0, min(row / 64, arg.metadata_rows - T::ROW_GROUPS));
}

// ---------------------------------------------------------------------------------------- producer

template <typename T>
__device__ void produce(const Arguments& arg, const Shared<T>& shared, Schedule<T> schedule,
                        int rank) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  Cursor<T> at;
  Piece piece;
  while (schedule.next(piece)) {
    const int row = (piece.row_tile * kCluster + rank) * T::BLOCK_ROWS;
    const int column = piece.column_tile * T::COLUMNS;
    const CUtensorMap* a = piece.dense ? &arg.a_dense : &arg.a;
    const int row_group = first_metadata<T>(arg, row);
    for (int i = piece.first; i < piece.last; i++) {
      const int k_block = piece.k_block(arg, i);
      const uint32_t full = shared.full(at.stage);
      barrier_wait(shared.empty(at.stage), at.parity ^ 1);
      barrier_arrive_expect(full, T::A_BYTES + (piece.dense ? 0 : T::E_BYTES) +
                                      piece.chunks * (T::B_BYTES / T::CHUNKS));
      if (!piece.dense) {
        copy_box(shared.metadata(at.stage), &arg.metadata, full, 0, k_block, row_group);
      }
      copy_box(shared.a(at.stage), a, full, k_block * (kBlock / 2), row, piece.dense ? i & 1 : 0);
      // One box, where the columns are there: several small ones keep the copy engine busy longer
      // than their bytes (1.2 times the time of the product, for the tile of 256 columns).
      const uint32_t to = shared.b(at.stage) + rank * T::B_BYTES / kCluster;
      const int z = (k_block * kBlock + rank * kStep) / 4;
      if (column + T::COLUMNS <= arg.n) {
        copy_box_multicast(to, &arg.b, full, kAll, 0, 0, z, column / kChunk);
      } else {
        for (int chunk = 0; chunk < piece.chunks; chunk++) {
          copy_box_multicast(to + chunk * kStep * 128, &arg.b_chunk, full, kAll,
                             column + chunk * kChunk, 0, z);
        }
      }
      at.advance();
    }
  }
}

// ---------------------------------------------------------------------------------------- consumer

template <typename T, int COLUMNS>
using Accumulator = float[T::ROW_BLOCKS][COLUMNS / 2];

// One step of 32 along K for each group of 64 rows of the warpgroup, as one group of products.
template <typename T, int COLUMNS, int STEP>
__device__ void multiply_step(Accumulator<T, COLUMNS>& sums,
                              const uint32_t (&metadata)[T::ROW_BLOCKS], uint32_t a, uint32_t b) {
  wgmma_fence();
  const uint64_t b_step =
      descriptor(b + STEP * T::B_BYTES / kCluster, kStep * 128, 1024, kSwizzle128);
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    const uint64_t a_step = descriptor(a + block * 64 * kBlock + STEP * 32, 16, 512, kSwizzle64);
    wgmma_sparse<COLUMNS, STEP>(sums[block], a_step, b_step, metadata[block]);
  }
  wgmma_commit();
}

// Sums the stages of a piece of COLUMNS columns. What the next stage needs is made ready between
// the two steps of this one, while the products of the first run: the tensor cores take few
// products in advance, so that whatever stands between two stages is time in which they may idle.
template <typename T, int COLUMNS>
__device__ void multiply(Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                         const Shared<T>& shared, Cursor<T>& at, const Piece& piece, int first_row,
                         int warpgroup, int thread) {
  uint32_t words[T::ROW_BLOCKS];  // where in a stage this thread's metadata lies
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    // Rows beyond M have zero values; any metadata does.
    const int group = min(first_row / 64 + block, arg.metadata_rows - 1) -
                      first_metadata<T>(arg, first_row - warpgroup * T::ROW_BLOCKS * 64);
    words[block] = (group * kWords + thread) * 4;
  }
  const uint32_t a_offset = warpgroup * T::ROW_BLOCKS * 64 * kBlock;
  const auto make_ready = [&](uint32_t (&metadata)[T::ROW_BLOCKS], int i) {
    barrier_wait(shared.full(at.stage), at.parity);
#pragma unroll
    for (int block = 0; block < T::ROW_BLOCKS; block++) {
      metadata[block] = piece.dense ? (i & 1 ? kKeepsLastTwo : kKeepsFirstTwo)
                                    : load_shared(shared.metadata(at.stage) + words[block]);
    }
  };
  uint32_t metadata[2][T::ROW_BLOCKS];
  make_ready(metadata[0], piece.first);
  uint32_t before = 0;  // the barrier of the stage whose products may still run
  const auto stage = [&](int now, int i) {
    const uint32_t a = shared.a(at.stage) + a_offset, b = shared.b(at.stage);
    multiply_step<T, COLUMNS, 0>(sums, metadata[now], a, b);
    wgmma_wait<1>();
    if (before && thread < kCluster) barrier_arrive_at(before, thread);
    before = shared.empty(at.stage);
    at.advance();
    if (i + 1 < piece.last) make_ready(metadata[1 - now], i + 1);
    multiply_step<T, COLUMNS, 1>(sums, metadata[now], a, b);
  };
  for (int i = piece.first; i < piece.last; i += 2) {
    stage(0, i);
    if (i + 1 < piece.last) stage(1, i + 1);
  }
  wgmma_wait<0>();
  if (thread < kCluster) barrier_arrive_at(before, thread);
}

// ------------------------------------------------------------------------------- parts of a tile

// Where a warpgroup leaves the sums of a tile that another cluster finishes.
template <typename T>
__device__ float4* partial_of(const Arguments& arg, int block, int warpgroup) {
  constexpr int kFloats = T::BLOCK_ROWS * T::COLUMNS;
  return reinterpret_cast<float4*>(arg.partials + int64_t(block) * kFloats +
                                   warpgroup * (kFloats / kConsumers));
}

template <typename T, int COLUMNS>
__device__ void leave_partial(const Accumulator<T, COLUMNS>& sums, const Arguments& arg, int block,
                              int warpgroup, int thread) {
  float4* to = partial_of<T>(arg, block, warpgroup) + thread;
#pragma unroll
  for (int r = 0; r < T::ROW_BLOCKS; r++) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++) {
      const float* d = &sums[r][4 * i];
      to[(r * (COLUMNS / 8) + i) * 128] = make_float4(d[0], d[1], d[2], d[3]);
    }
  }
  __threadfence();
  named_sync(1 + warpgroup, 128);
  if (thread == 0) {
    asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(arg.partial_done + block * kConsumers +
                                                            warpgroup)
                 : "memory");
  }
}

// Adds them in a fixed order, so that repeated runs agree bit for bit.
template <typename T, int COLUMNS>
__device__ void add_partial(Accumulator<T, COLUMNS>& sums, const Arguments& arg, int block,
                            int warpgroup, int thread) {
  const int* done = arg.partial_done + block * kConsumers + warpgroup;
  int ready = 0;
  while (!ready) {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(ready) : "l"(done) : "memory");
  }
  const float4* from = partial_of<T>(arg, block, warpgroup) + thread;
#pragma unroll
  for (int r = 0; r < T::ROW_BLOCKS; r++) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++) {
      const float4 part = __ldcg(from + (r * (COLUMNS / 8) + i) * 128);
      float* d = &sums[r][4 * i];
      d[0] += part.x;
      d[1] += part.y;
      d[2] += part.z;
      d[3] += part.w;
    }
  }
}

// ---------------------------------------------------------------------------------------- epilogue

template <typename Out>
__device__ __forceinline__ void store_pair(uint32_t to, float x, float y) {
  if constexpr (sizeof(Out) == 4) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
  } else {
    const __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(x, y));
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(reinterpret_cast<const uint32_t&>(pair))
                 : "memory");
  }
}

// Writes the warp's 16 rows of each block of 64, 128 bytes of every row at a time. The 16-byte
// units of a row change places with the row, so that no two threads meet in a bank.
template <typename T, typename Out, int COLUMNS>
__device__ void write_tile(const Accumulator<T, COLUMNS>& sums, const Arguments& arg,
                           const Piece& piece, int warp_row, int lane, uint32_t staging) {
  constexpr int kUnits = 128 / sizeof(Out);  // columns at a time
  const int rows = piece.dense ? arg.m_dense : arg.m;
  const int first_column = piece.column_tile * T::COLUMNS;
#pragma unroll
  for (int block = 0; block < T::ROW_BLOCKS; block++) {
    const int first_row = warp_row + block * 64;
    // Each thread writes 16 bytes of 4 rows.
    Out* to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = first_row + 4 * i + lane / 8;
      to[i] = nullptr;
      if (row < rows) {
        const int* places = piece.dense ? arg.dense_rows : arg.rows;
        const int64_t out_row = places ? places[row] : row;
        to[i] = static_cast<Out*>(arg.out) + out_row * arg.n + first_column;
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < COLUMNS / kUnits; chunk++) {
#pragma unroll
      for (int j = 0; j < kUnits / 8; j++) {
        const float* d = &sums[block][4 * (chunk * (kUnits / 8) + j)];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = lane / 4 + 8 * half;
          const int byte = (8 * j + lane % 4 * 2) * sizeof(Out);
          store_pair<Out>(staging + row * 128 + (byte ^ (row % 8) << 4), d[2 * half],
                          d[2 * half + 1]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 4 * i + lane / 8, column = chunk * kUnits + lane % 8 * (16 / sizeof(Out));
        const uint4 unit = load_shared_16(staging + row * 128 + (lane % 8 * 16 ^ (row % 8) << 4));
        if (to[i] && first_column + column < arg.n) {
          *reinterpret_cast<uint4*>(to[i] + column) = unit;
        }
      }
      __syncwarp();
    }
  }
}

// One piece of at least CHUNKS chunks. Each width has its sums for itself, up to its epilogue:
// where they would meet, the compiler copies accumulators and takes the products one at a time.
template <typename T, typename Out, int CHUNKS = 1>
__device__ void work_on(const Piece& piece, const Arguments& arg, const Shared<T>& shared,
                        Cursor<T>& at, int rank, int cluster, int warpgroup) {
  if constexpr (CHUNKS < T::CHUNKS) {
    if (piece.chunks > CHUNKS) {
      return work_on<T, Out, CHUNKS + 1>(piece, arg, shared, at, rank, cluster, warpgroup);
    }
  }
  constexpr int COLUMNS = CHUNKS * kChunk;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int first_row =
      (piece.row_tile * kCluster + rank) * T::BLOCK_ROWS + warpgroup * T::ROW_BLOCKS * 64;
  Accumulator<T, COLUMNS> sums;
#pragma unroll
  for (int i = 0; i < T::ROW_BLOCKS * COLUMNS / 2; i++)
    sums[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0;
  if (piece.first < piece.last) {
    multiply<T, COLUMNS>(sums, arg, shared, at, piece, first_row, warpgroup, thread);
  }
  if (!piece.finishes()) {
    leave_partial<T, COLUMNS>(sums, arg, cluster * kCluster + rank, warpgroup, thread);
    return;
  }
  for (int helper = 1; helper <= piece.helpers; helper++) {
    add_partial<T, COLUMNS>(sums, arg, (cluster - helper) * kCluster + rank, warpgroup, thread);
  }
  write_tile<T, Out, COLUMNS>(sums, arg, piece, first_row + warp * 16, lane,
                              shared.staging(warpgroup * 4 + warp));
}

template <typename T, typename Out>
__device__ void consume(const Arguments& arg, const Shared<T>& shared, Schedule<T> schedule,
                        int rank, int cluster, int warpgroup) {
  Cursor<T> at;
  Piece piece;
  while (schedule.next(piece)) work_on<T, Out>(piece, arg, shared, at, rank, cluster, warpgroup);
}

// ------------------------------------------------------------------------------------------ kernel

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, 1)
    matmul24_kernel(const __grid_constant__ Arguments arg) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<T> shared{shared_address(memory)};
  const int rank = cluster_rank();
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::STAGES; stage++) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kConsumers * kCluster);
    }
    barrier_init_fence();
    prefetch_map(&arg.a);
    prefetch_map(&arg.b);
  }
  cluster_sync();
  const Schedule<T> schedule(arg, cluster, clusters);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>(arg, shared, schedule, rank);
    __syncwarp();  // the warp arrives at the cluster's barrier as one
  } else {
    raise_registers<kConsumerRegisters>();
    consume<T, Out>(arg, shared, schedule, rank, cluster, warpgroup - 1);
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
                  bool stream_k, uint8_t* workspace, size_t workspace_bytes) {
  int device, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(matmul24_kernel<T, Out>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES);
  }
  if (error != cudaSuccess) return status("matmul24", error);
  blocks = blocks / kCluster * kCluster;

  const int64_t k = in.b.dimensions()[0], kept = k / 2, n = arg.n;
  const int64_t member = strided ? k / 4 * n : n, group = strided ? n : 4 * n;
  const int64_t metadata_columns = in.metadata.dimensions()[1];
  const bool mapped =
      map_tensor(&arg.a, in.values.untyped_data(), 2, {kept, arg.m, 1}, {kept, kept * arg.m},
                 {kBlock / 2, T::BLOCK_ROWS, 1}, CU_TENSOR_MAP_SWIZZLE_64B) &&
      (arg.m_dense == 0 || map_tensor(&arg.a_dense, in.dense.untyped_data(), 2,
                                      {kept, arg.m_dense, 2}, {kept, kept * arg.m_dense},
                                      {kBlock / 2, T::BLOCK_ROWS, 1}, CU_TENSOR_MAP_SWIZZLE_64B)) &&
      map_tensor(&arg.metadata, in.metadata.untyped_data(), 4,
                 {kWords, metadata_columns, arg.metadata_rows}, {kWords, kWords * metadata_columns},
                 {kWords, 1, T::ROW_GROUPS}, CU_TENSOR_MAP_SWIZZLE_NONE) &&
      map_tensor<4>(&arg.b, in.b.untyped_data(), 2,
                    {kChunk, 4, k / 4, std::max<int64_t>(1, n / kChunk)}, {member, group, kChunk},
                    {kChunk, 4, kStep / 4, T::CHUNKS}, CU_TENSOR_MAP_SWIZZLE_128B) &&
      map_tensor(&arg.b_chunk, in.b.untyped_data(), 2, {n, 4, k / 4}, {member, group},
                 {kChunk, 4, kStep / 4}, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!mapped) return failed("matmul24", "cuTensorMapEncodeTiled refused an operand");

  divide<T>(arg, blocks / kCluster, stream_k);
  if (arg.cut_work) {
    const size_t flags = blocks * kConsumers * sizeof(int);
    const size_t partials = size_t(blocks) * T::BLOCK_ROWS * T::COLUMNS * sizeof(float);
    if (workspace_bytes < partials + flags) return failed("matmul24", "the workspace is too small");
    arg.partials = reinterpret_cast<float*>(workspace);
    arg.partial_done = reinterpret_cast<int*>(workspace + partials);
    error = cudaMemsetAsync(arg.partial_done, 0, flags, stream);
    if (error != cudaSuccess) return status("matmul24", error);
  }

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = T::SHARED_BYTES;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return status("matmul24", cudaLaunchKernelEx(&config, matmul24_kernel<T, Out>, arg));
}

template <typename T>
ffi::Error launch_typed(cudaStream_t stream, const Arguments& arg, const Matrices& in, bool strided,
                        bool stream_k, ffi::AnyBuffer out, ffi::ResultBuffer<ffi::U8>& workspace) {
  uint8_t* bytes = workspace->typed_data();
  return out.element_type() == ffi::DataType::F32
             ? launch<T, float>(stream, arg, in, strided, stream_k, bytes, workspace->size_bytes())
             : launch<T, __nv_bfloat16>(stream, arg, in, strided, stream_k, bytes,
                                        workspace->size_bytes());
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
                    int32_t stream_k, int32_t strided) {
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
  arg.k_blocks = static_cast<int>(metadata.dimensions()[1]);
  arg.group = group;
  switch (tile) {
    case 0:
      return launch_typed<Tile<2, 192>>(stream, arg, in, strided, stream_k, *out, workspace);
    case 1:
      return launch_typed<Tile<1, 256>>(stream, arg, in, strided, stream_k, *out, workspace);
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
                                  .Attr<int32_t>("stream_k")
                                  .Attr<int32_t>("strided"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
