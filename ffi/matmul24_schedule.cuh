// What matmul24's clusters work on, and in which order: tiles, and tiles cut along K.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace s24jax {

constexpr int kConsumers = 2;  // warpgroups that multiply; one more copies
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kCluster = 2;              // blocks that share B's columns
constexpr int kChunk = 64;               // columns of B that are copied together
constexpr int kBlock = 128;              // positions along K of A that are copied together
constexpr int kHalf = kBlock / 2;        // and of B
constexpr int kStep = kHalf / kCluster;  // of one product, and of B's rows that a block copies
static_assert(kStep == 32);
constexpr int kWords = 128;               // of metadata, of 64 rows and half a block along K
constexpr int kSharedBytes = 227 * 1024;  // what a block may have
constexpr int kStagingBytes = 2048;       // of them per warp, for the epilogue
constexpr int kStaging = kConsumers * 4 * kStagingBytes;
constexpr int kPieces = 2;          // that are known in advance
constexpr int kBarrierBytes = 256;  // for barriers and pieces

// The work of one cluster at a time: ROW_BLOCKS x 64 rows a warpgroup, COLUMNS columns.
template <int ROW_BLOCKS_, int COLUMNS_>
struct Tile {
  static constexpr int ROW_BLOCKS = ROW_BLOCKS_;
  static constexpr int COLUMNS = COLUMNS_;
  static constexpr int BLOCK_ROWS = 64 * ROW_BLOCKS * kConsumers;
  static constexpr int ROWS = BLOCK_ROWS * kCluster;
  static constexpr int CHUNKS = COLUMNS / kChunk;
  static constexpr int PARTIAL_FLOATS = BLOCK_ROWS * COLUMNS;  // sums of one block of a cluster
  // Two rings in shared memory: A with its metadata, a block along K a stage; B, half a block.
  static constexpr int ROW_GROUPS = BLOCK_ROWS / 64;
  static constexpr int A_BYTES = BLOCK_ROWS * kBlock;  // half of the values, 2 bytes each
  static constexpr int E_BYTES = ROW_GROUPS * 2 * kWords * 4;
  static constexpr int B_BYTES = COLUMNS * kHalf * 2;
  static constexpr int B_STAGES = 4;
  static constexpr int A_STAGES =
      (kSharedBytes - kStaging - kBarrierBytes - B_STAGES * B_BYTES) / (A_BYTES + E_BYTES);
  static constexpr int SHARED_BYTES =
      A_STAGES * (A_BYTES + E_BYTES) + B_STAGES * B_BYTES + kStaging + kBarrierBytes;
  static_assert((A_BYTES + E_BYTES) % 1024 == 0 && B_BYTES % 1024 == 0,
                "the swizzle repeats every 1024 bytes");
};

// Tiles of one kind, in the order in which they are worked on: of sparse rows or dense ones, of all
// columns or those of the last tile, which may be narrower.
struct Kind {
  int row_tiles, column_tiles, first_column_tile;
  int chunks, stages;
  bool dense;
  int whole;  // tiles, in full waves, before those that may be cut
  int parts;  // of each of those
  int slot;   // of the first partial sum of them

  __host__ __device__ int rest() const { return row_tiles * column_tiles - whole; }
  __host__ __device__ int pieces() const { return rest() * parts; }
  // Of one stage, by the shared memory that its products read: for 64 rows a step reads 2 KiB of A
  // and 4 KiB of B for each chunk.
  int stage_work() const { return 2 * chunks + 1; }
  int work() const { return stages * stage_work(); }
};

constexpr int kKinds = 4;
constexpr int kParts[] = {1, 2, 3, 4, 5, 6, 8, 12, 16};  // into which a tile may be cut
// What it costs to leave a partial sum, or to add one, in stages.
constexpr int kPartialStages = 4;

struct Arguments {
  CUtensorMap a, a_dense, metadata;
  CUtensorMap b, b_chunk;  // a full tile's columns; those of one chunk
  const int* rows;         // where in the result each sparse row of A goes; null: the same row
  const int* dense_rows;   // likewise the dense rows
  const int* k_lists;      // [row tiles, k blocks]: which k blocks a tile multiplies; null: all
  const int* k_counts;     // [row tiles]: how many of them
  void* out;
  float* partials;  // a block's sums for each slot and rank in the cluster
  int* arrived;     // for each slot, rank and warpgroup: parts that are there; zero at the start
  int m, m_dense, n;
  int k_blocks;       // the last one padded with zeros
  int metadata_rows;  // groups of 64 rows of A
  int group;          // row tiles that are walked together, so that they share B's columns in L2
  Kind kinds[kKinds];
};

// A tile, or a part of it along K: stages first .. last - 1.
struct alignas(16) Piece {
  int row_tile, column_tile;
  int chunks;  // of 64 columns
  int dense;
  int first, last;
  int part, parts;
  int slot;  // of the first part

  // Which block along K stage i multiplies: a dense row passes each twice.
  __device__ int k_block(const Arguments& arg, int i) const {
    if (dense) return i / 2;
    if (!arg.k_lists) return i;
    return arg.k_lists[row_tile * arg.k_blocks + i];
  }
};

// Which pieces a cluster works on: of each wave one.
class Schedule {
 public:
  __host__ __device__ Schedule(const Arguments& arguments, int cluster, int clusters)
      : arg_(arguments), next_(cluster), clusters_(clusters) {}

  __host__ __device__ bool next(Piece& piece) {
    int i = next_;
    next_ += clusters_;
    for (const Kind& kind : arg_.kinds) {
      if (i < kind.whole) {
        place(kind, i, 0, 1, piece);
        return true;
      }
      i -= kind.whole;
    }
    for (const Kind& kind : arg_.kinds) {
      if (i < kind.pieces()) {
        // The same part of all tiles, then the next: what runs together reads the same of K.
        const int tile = i % kind.rest();
        place(kind, kind.whole + tile, i / kind.rest(), kind.parts, piece);
        piece.slot = kind.slot + tile * kind.parts;
        return true;
      }
      i -= kind.pieces();
    }
    return false;
  }

 private:
  __host__ __device__ void place(const Kind& kind, int tile, int part, int parts,
                                 Piece& piece) const {
    const int in_group = arg_.group * kind.column_tiles;
    const int first_row = tile / in_group * arg_.group;
    const int group = min(arg_.group, kind.row_tiles - first_row);
    piece.row_tile = first_row + tile % in_group % group;
    piece.column_tile = kind.first_column_tile + tile % in_group / group;
    piece.chunks = kind.chunks;
    piece.dense = kind.dense;
    const bool listed = arg_.k_counts && !kind.dense;
    const int stages = listed ? arg_.k_counts[piece.row_tile] : kind.stages;
    piece.first = stages * part / parts;
    piece.last = stages * (part + 1) / parts;
    piece.parts = parts;
    piece.part = part;
  }

  const Arguments& arg_;
  int next_;
  const int clusters_;
};

template <typename T>
Kind kind_of(const Arguments& arg, bool dense, bool last) {
  const int rows = dense ? arg.m_dense : arg.m;
  const int full_columns = arg.n / T::COLUMNS, rest = arg.n % T::COLUMNS;
  Kind kind = {};
  kind.row_tiles = (rows + T::ROWS - 1) / T::ROWS;
  kind.column_tiles = last ? rest > 0 : full_columns;
  kind.first_column_tile = last ? full_columns : 0;
  kind.chunks = last ? (rest + kChunk - 1) / kChunk : T::CHUNKS;
  kind.stages = arg.k_blocks * (dense ? 2 : 1);
  kind.dense = dense;
  kind.parts = 1;
  return kind;
}

// Until when the slowest cluster works on what may be cut; partial sums cost the more, the more
// parts a tile has.
inline int64_t makespan(const Kind (&kinds)[kKinds], int clusters) {
  std::vector<int64_t> busy(clusters);
  int next = 0, last = 0;
  for (const Kind& kind : kinds) {
    const int partial = kind.parts > 1 ? kPartialStages * kind.stage_work() : 0;
    for (int i = 0; i < kind.pieces(); i++) {
      busy[next++ % clusters] += kind.work() / kind.parts + partial;
    }
    if (kind.rest()) last = std::max(last, kind.parts * partial);
  }
  return *std::max_element(busy.begin(), busy.end()) + last;
}

// Sets `kinds`. Tiles in full waves come first. What is left would fill the last waves in part and
// leave clusters idle, so it is cut into parts: as many as make the last cluster be done first.
// (Shares of equal work that begin anywhere along K, "stream-K", fill the last wave better, but
// then no two clusters read the same of A or B at the same time, and they all wait for DRAM.)
// Returns how many partial sums that makes.
template <typename T>
int divide(Arguments& arg, int clusters, int most_partials) {
  for (int k = 0; k < kKinds; k++) {
    arg.kinds[k] = kind_of<T>(arg, k % 2, k / 2);
    arg.kinds[k].whole = arg.kinds[k].rest() / clusters * clusters;
  }
  if (arg.k_counts) return 0;
  int64_t least = makespan(arg.kinds, clusters);
  int partials = 0;
  for (const int of_full : kParts) {
    for (const int of_last : kParts) {
      Kind kinds[kKinds];
      int slots = 0;
      for (int k = 0; k < kKinds; k++) {
        kinds[k] = arg.kinds[k];
        // A dense row is twice as long.
        kinds[k].parts = std::min((k % 2 + 1) * (k / 2 ? of_last : of_full), kinds[k].stages);
        kinds[k].slot = slots;
        if (kinds[k].parts > 1) slots += kinds[k].pieces();
      }
      if (slots > most_partials) continue;
      const int64_t time = makespan(kinds, clusters);
      if (time >= least) continue;
      least = time;
      partials = slots;
      std::copy(kinds, kinds + kKinds, arg.kinds);
    }
  }
  return partials;
}

}  // namespace s24jax
