// The schedule of matmul24 on the host, for tests/test_schedule.py.
#include "matmul24_schedule.cuh"

using namespace s24jax;

namespace {

template <typename T>
int walk(Arguments arg, int clusters, int most_partials, int* out, int most) {
  const int partials = divide<T>(arg, clusters, most_partials);
  int count = 0;
  for (int cluster = 0; cluster < clusters; cluster++) {
    Schedule schedule(arg, cluster, clusters);
    Piece piece;
    for (int turn = 0; schedule.next(piece); turn++) {
      if (count == most) return -1;
      const int fields[] = {cluster,
                            turn,
                            piece.row_tile,
                            piece.column_tile,
                            piece.chunks,
                            piece.dense,
                            piece.first,
                            piece.last,
                            piece.parts,
                            piece.part,
                            piece.parts > 1 ? piece.slot : -1,
                            partials};
      std::copy(std::begin(fields), std::end(fields), out + 12 * count++);
    }
  }
  return count;
}

}  // namespace

// Writes 12 numbers for each piece of every cluster, at most so many pieces; returns how many.
// `k_counts`: the lengths of lists of K blocks, or null.
extern "C" int walk(int tile, int m, int m_dense, int n, int k_blocks, int group, int clusters,
                    int most_partials, const int* k_counts, int* out, int most) {
  Arguments arg = {};
  arg.m = m;
  arg.m_dense = m_dense;
  arg.n = n;
  arg.k_blocks = k_blocks;
  arg.group = group;
  arg.k_counts = k_counts;
  return tile ? walk<Tile<1, 256>>(arg, clusters, most_partials, out, most)
              : walk<Tile<2, 192>>(arg, clusters, most_partials, out, most);
}
