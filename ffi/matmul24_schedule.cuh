// What matmul24's clusters work on, and in which order: tiles, and tiles cut along K.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <cstdint>

namespace s24jax {

constexpr int kConsumers = 2;  // warpgroups that multiply; one more copies
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kCluster = 2;               // blocks that share B's columns
constexpr int kChunk = 64;                // columns of B that are copied together
constexpr int kBlock = 64;                // positions along K of one stage
constexpr int kStep = kBlock / kCluster;  // of one product, and of B's rows that a block copies
static_assert(kStep == 32);
constexpr int kWords = 128;               // of metadata, of 64 rows and one stage
constexpr int kSharedBytes = 227 * 1024;  // what a block may have
constexpr int kStagingBytes = 2048;       // of them per warp, for the epilogue
constexpr int kStaging = kConsumers * 4 * kStagingBytes;
constexpr int kBarrierBytes = 128;

// The work of one cluster at a time: ROW_BLOCKS x 64 rows a warpgroup, COLUMNS columns.
template <int ROW_BLOCKS_, int COLUMNS_>
struct Tile {
  static constexpr int ROW_BLOCKS = ROW_BLOCKS_;
  static constexpr int COLUMNS = COLUMNS_;
  static constexpr int BLOCK_ROWS = 64 * ROW_BLOCKS * kConsumers;
  static constexpr int ROWS = BLOCK_ROWS * kCluster;
  static constexpr int CHUNKS = COLUMNS / kChunk;
  // One stage in shared memory: A, B, metadata.
  static constexpr int ROW_GROUPS = BLOCK_ROWS / 64;
  static constexpr int A_BYTES = BLOCK_ROWS * kBlock;  // half of the values, 2 bytes each
  static constexpr int B_BYTES = COLUMNS * kBlock * 2;
  static constexpr int E_BYTES = ROW_GROUPS * kWords * 4;
  static constexpr int STAGE_BYTES = A_BYTES + B_BYTES + E_BYTES;
  static constexpr int STAGES = (kSharedBytes - kStaging - kBarrierBytes) / STAGE_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + kStaging + kBarrierBytes;
  static_assert(STAGE_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(2 * STAGES * sizeof(uint64_t) <= kBarrierBytes);
};

struct Arguments {
  CUtensorMap a, a_dense, metadata;
  CUtensorMap b, b_chunk;  // a full tile's columns; those of one chunk
  const int* rows;         // where in the result each sparse row of A goes; null: the same row
  const int* dense_rows;   // likewise the dense rows
  const int* k_lists;      // [row tiles, k blocks]: which k blocks a tile multiplies; null: all
  const int* k_counts;     // [row tiles]: how many of them
  void* out;
  float* partials;    // one tile of float32 a block
  int* partial_done;  // one flag a block and warpgroup, zero at the start
  int m, m_dense, n;
  int k_blocks;       // the last one padded with zeros
  int metadata_rows;  // groups of 64 rows of A
  int group;          // row tiles that are walked together, so that they share B's columns in L2
  int whole;          // tiles that one cluster multiplies alone; the others are cut evenly along K
  int cut_work;       // of those others: see Kind
};

// A tile, or a part of it along K: stages first .. last - 1 of total.
struct Piece {
  int row_tile, column_tile;
  int chunks;  // of 64 columns
  bool dense;
  int first, last, total;
  int helpers;  // clusters before this one that multiply the stages below `first`

  __device__ bool finishes() const { return last == total; }

  // Which block along K stage i multiplies: a dense row passes each twice.
  __device__ int k_block(const Arguments& arg, int i) const {
    if (dense) return i / 2;
    if (!arg.k_lists) return i;
    return arg.k_lists[row_tile * arg.k_blocks + i];
  }
};

// Tiles of one kind, in the order in which they are worked on: of sparse rows or dense ones, of all
// columns or those of the last tile, which may be narrower.
struct Kind {
  int row_tiles, column_tiles, first_column_tile;
  int chunks, stages;
  bool dense;

  __host__ __device__ int tiles() const { return row_tiles * column_tiles; }
  // Of one stage, by the shared memory that its products read: for 64 rows a step reads 2 KiB of A
  // and 4 KiB of B for each chunk.
  __host__ __device__ int stage_work() const { return 2 * chunks + 1; }
  __host__ __device__ int work() const { return stages * stage_work(); }
};

constexpr int kKinds = 4;

template <typename T>
__host__ __device__ Kind kind_of(const Arguments& arg, int kind) {
  const bool dense = kind >= 2, last = kind % 2;
  const int rows = dense ? arg.m_dense : arg.m;
  const int full_columns = arg.n / T::COLUMNS, rest = arg.n % T::COLUMNS;
  return {(rows + T::ROWS - 1) / T::ROWS, last ? (rest ? 1 : 0) : full_columns,
          last ? full_columns : 0,        last ? (rest + kChunk - 1) / kChunk : T::CHUNKS,
          arg.k_blocks * (dense ? 2 : 1), dense};
}

// Which pieces a cluster works on, in order. Whole tiles in equal waves leave the last wave partly
// empty, so the last of them, and those of other sizes, are cut along K into equal shares, one a
// cluster ("stream-K", Osama et al. 2023). A share is walked backwards: it begins with the head of
// a tile, whose sum the next cluster needs, and ends with the tail of one, which it finishes with
// the sum that the cluster before it left long ago.
template <typename T>
class Schedule {
 public:
  __device__ Schedule(const Arguments& arguments, int cluster, int clusters)
      : arg_(arguments), cluster_(cluster), clusters_(clusters), next_whole_(cluster) {
    begin_ = share(cluster);
    cursor_ = share(cluster + 1);
  }

  __device__ bool next(Piece& piece) {
    if (cursor_ > begin_) {
      cut(piece);
      return true;
    }
    if (next_whole_ >= arg_.whole) return false;
    int tile = next_whole_, kind = 0;
    while (tile >= kind_of<T>(arg_, kind).tiles()) tile -= kind_of<T>(arg_, kind++).tiles();
    place(kind_of<T>(arg_, kind), tile, piece);
    if (arg_.k_counts && !piece.dense) piece.total = arg_.k_counts[piece.row_tile];
    piece.first = 0;
    piece.last = piece.total;
    piece.helpers = 0;
    next_whole_ += clusters_;
    return true;
  }

 private:
  // The kind that holds the unit of work at `at`, counted from the first tile that is cut, and
  // where the first tile of that kind that is cut begins.
  __device__ Kind find(int at, int& start, int& first_tile) const {
    start = 0;
    for (int k = 0;; k++) {
      const Kind kind = kind_of<T>(arg_, k);
      first_tile = k == 0 ? min(arg_.whole, kind.tiles()) : 0;
      const int end = start + (kind.tiles() - first_tile) * kind.work();
      if (at < end || k == kKinds - 1) return kind;
      start = end;
    }
  }

  // Where the share of a cluster begins, between two stages.
  __device__ int share(int cluster) const {
    const int at = static_cast<int>(int64_t(arg_.cut_work) * cluster / clusters_);
    int start, first_tile;
    const Kind kind = find(at, start, first_tile);
    return at - (at - start) % kind.stage_work();
  }

  // The last piece of the share that is left.
  __device__ void cut(Piece& piece) {
    int start, first_tile;
    const Kind kind = find(cursor_ - 1, start, first_tile);
    const int i = (cursor_ - 1 - start) / kind.work();
    start += i * kind.work();
    place(kind, first_tile + i, piece);
    piece.first = (max(begin_, start) - start) / kind.stage_work();
    piece.last = (cursor_ - start) / kind.stage_work();
    piece.helpers = 0;
    if (piece.finishes()) {
      for (int c = cluster_; share(c) > start; c--) piece.helpers++;
    }
    cursor_ = max(begin_, start);
  }

  __device__ void place(const Kind& kind, int tile, Piece& piece) const {
    const int in_group = arg_.group * kind.column_tiles;
    const int first_row = tile / in_group * arg_.group;
    const int group = min(arg_.group, kind.row_tiles - first_row);
    piece.row_tile = first_row + tile % in_group % group;
    piece.column_tile = kind.first_column_tile + tile % in_group / group;
    piece.chunks = kind.chunks;
    piece.dense = kind.dense;
    piece.total = kind.stages;
  }

  const Arguments& arg_;
  int cluster_, clusters_;
  int next_whole_;
  int begin_, cursor_;
};

// Splits the tiles into those that one cluster multiplies alone, in full waves of full tiles, and
// the rest, one to two tiles' worth of work a cluster, which is cut along K.
template <typename T>
void divide(Arguments& arg, int clusters, bool stream_k) {
  int64_t work = 0;
  arg.whole = arg.cut_work = 0;
  for (int k = 0; k < kKinds; k++) {
    const Kind kind = kind_of<T>(arg, k);
    work += int64_t(kind.tiles()) * kind.work();
    arg.whole += kind.tiles();
  }
  // No share may be empty: too little work is not cut.
  if (!stream_k || work < clusters * int64_t(2 * T::CHUNKS + 1)) return;
  const Kind full = kind_of<T>(arg, 0);
  const int64_t waves = work / (int64_t(clusters) * full.work()) - 1;
  arg.whole = clusters * std::clamp<int64_t>(waves, 0, full.tiles() / clusters);
  arg.cut_work = static_cast<int>(work - int64_t(arg.whole) * full.work());
}

}  // namespace s24jax
