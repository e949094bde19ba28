// Block-sparse attention: a band cut down to the blocks that a list names, anew for every head.
//
// A row of blocks is a count, ascending indices, and beside each index a flag: is the band kept from cutting this
// block? One list with flags, not a second list of full blocks: the cursor follows one position per row instead of
// merging two, and no content of the buffers can name a block twice or call full what is not kept.
//
// Tiles need not be blocks: a tile may be a block, a part of one, two of them, or lie across an edge. Where it meets at
// most two blocks on either axis, it has at most 2 × 2 cells, each in one block, and is full when all its cells are.
// The cursor reads the list; with a partial tile it yields what it read of the tile's cells, which is all that a mask
// needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

#include "fastattn/schedule/band.hpp"

namespace fastattn {

// Dense in rows, [rows of blocks, blocks in a row]; what lies past a row's count is not read.
struct BlockRows {
  const std::int32_t* counts;
  const std::int32_t* indices;  // ascending within a row, none twice
  const bool* full;             // the band does not cut this block; null: it cuts every block
  int first = 0;                // row 0 of this head, among those of all heads: pointers moved would cost registers

  // The position of a row's entries; a row has room for `width`.
  FASTATTN_HD constexpr std::int64_t entries(int row, int width) const { return std::int64_t{first + row} * width; }
  FASTATTN_HD constexpr int count(int row) const { return counts[first + row]; }
};

// The mask of one head: query q keeps key k when the block of (q, k) is listed and is full or the band keeps (q, k).
struct BlockList {
  int num_q, num_k;   // tokens
  int left, right;    // the band, see Band; causal: right = 0
  TileShape block;    // tokens in a block
  BlockRows rows;     // of query blocks
  BlockRows columns;  // of key blocks: the same blocks transposed; null where only the forward is wanted

  // Bounds how far a cursor reads ahead before it yields: a kernel loads the first tile of a run when the run is known.
  static constexpr int kLongestRun = 16;

  enum class Share : std::uint8_t { kNothing, kSome, kAll };

  // A run's cells: of cell i = 2 · (in the tile's second row of blocks) + (in its second column) bit i is set if any of
  // it is kept, and bit kFullCells + i if its block is listed as full too.
  static constexpr int kFullCells = 4;

  // A row of a tile: what the band keeps, and the blocks left and right of `split`.
  struct RowMask {
    Interval band, exists;
    int split;
    bool kept[2], full[2];  // full: all that exists, whatever the band says

    FASTATTN_HD constexpr bool keeps(int k) const {
      const bool right = k >= split;
      return (right ? kept[1] : kept[0]) && (band.contains(k) || ((right ? full[1] : full[0]) && exists.contains(k)));
    }
    FASTATTN_HD constexpr std::uint32_t lane_bits(int first) const {
      const std::uint32_t left = lane_bits_below(split, first);
      const auto blocks = [left](const bool (&bit)[2]) { return (bit[0] ? left : 0) | (bit[1] ? ~left : 0); };
      return blocks(kept) & (fastattn::lane_bits(band, first) | (blocks(full) & fastattn::lane_bits(exists, first)));
    }
  };

  struct TileMask {
    Band::TileMask band;
    TileShape split;  // where the tile's second blocks begin
    std::uint16_t cells;

    FASTATTN_HD constexpr RowMask row(int q) const {
      const int first = q >= split.q ? 2 : 0;
      const auto bit = [this, first](int i) { return (cells >> (first + i) & 1) != 0; };
      return {
          band.row(q).kept, band.existing_keys(q), split.k, {bit(0), bit(1)}, {bit(kFullCells), bit(kFullCells + 1)}};
    }
  };

  // Is there no tile of this shape that meets more than two blocks on an axis? runs() and tile_mask() need that.
  constexpr bool supports(TileShape shape) const {
    const auto fits = [](int tile, int block) { return tile <= block + std::gcd(tile, block); };
    return fits(shape.q, block.q) && fits(shape.k, block.k);
  }

  // Searches the list, in log2(count) reads. In a kernel, ask a tile_mask().
  constexpr bool keeps(int q, int k) const {
    if (q < 0 || q >= num_q || k < 0 || k >= num_k) {
      return false;
    }
    const int row = q / block.q, column = k / block.k;
    const std::int64_t begin = rows.entries(row, blocks_k()), end = begin + rows.count(row);
    const std::int64_t entry = std::lower_bound(rows.indices + begin, rows.indices + end, column) - rows.indices;
    if (entry == end || rows.indices[entry] != column) {
      return false;
    }
    return (rows.full != nullptr && rows.full[entry]) || band().keeps(q, k);
  }

  FASTATTN_HD constexpr TileMask tile_mask(int q_tile, int k_tile, TileShape shape, std::uint16_t cells) const {
    const int row = q_tile * shape.q / block.q, column = k_tile * shape.k / block.k;
    const TileShape split{(row + 1) * block.q - q_tile * shape.q, (column + 1) * block.k - k_tile * shape.k};
    return {band().tile_mask(q_tile, k_tile, shape, cells), split, cells};
  }

  FASTATTN_HD constexpr int query_token(int slot) const { return slot < num_q ? slot : -1; }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape shape) const {
    return query_token(q_tile * shape.q + row);
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return slot < num_k ? slot : -1; }
  FASTATTN_HD constexpr int query_origin(int q_tile, TileShape shape) const { return q_tile * shape.q; }
  FASTATTN_HD constexpr int key_origin(int k_tile, TileShape shape) const { return k_tile * shape.k; }
  constexpr int query_box(TileShape shape) const { return shape.q; }
  constexpr int key_box(TileShape shape) const { return shape.k; }

  struct Cursor;
  FASTATTN_HD constexpr Cursor runs(int q_tile, TileShape shape) const;

  FASTATTN_HD constexpr BlockList transposed() const {
    return {num_k, num_q, right, left, {block.k, block.q}, columns, rows};
  }

  FASTATTN_HD constexpr Band band() const { return {num_q, num_k, left, right}; }
  FASTATTN_HD constexpr int blocks_q() const { return ceil_div(num_q, block.q); }
  FASTATTN_HD constexpr int blocks_k() const { return ceil_div(num_k, block.k); }

  // How much is kept of the cell at (q, k), which lies in one listed block.
  FASTATTN_HD constexpr Share share(int q, int k, TileShape cell, bool full) const {
    const int q_end = min_of(q + cell.q, num_q), k_end = min_of(k + cell.k, num_k);
    const int lowest = k - (q_end - 1) - (num_k - num_q), highest = k_end - 1 - q - (num_k - num_q);
    const bool any = full || (-left <= highest && lowest <= right);
    const bool all = full || (-left <= lowest && highest <= right);
    if (q >= q_end || k >= k_end || !any) {
      return Share::kNothing;
    }
    const bool ragged = q_end - q < cell.q || k_end - k < cell.k;
    return all && !ragged ? Share::kAll : Share::kSome;
  }
};

// One row of blocks, read entry by entry.
struct BlockRowReader {
  int at, end;  // entries, counted from the first row of the tile
  int block;    // what entry `at` names
  bool full;

  static constexpr int kPastTheEnd = std::numeric_limits<int>::max();

  // `row`: the tile's first row of blocks.
  FASTATTN_HD constexpr void read(const BlockRows& rows, int row, int width) {
    const std::int64_t entry = rows.entries(row, width) + at;
    block = at < end ? rows.indices[entry] : kPastTheEnd;
    full = at < end && rows.full != nullptr && rows.full[entry];
  }
};

struct BlockList::Cursor {
  BlockList list;
  TileShape shape;
  int row;               // the tile's first row of blocks
  int q_first, q_split;  // the tile's first query, and where its second row of blocks begins
  int block_end;         // no block from here on keeps anything
  int next_tile;
  BlockRowReader first, second;  // the tile's rows of blocks
  TileRun ahead;                 // what was read and is not yet yielded; count 0: nothing

  FASTATTN_HD constexpr bool next(TileRun& run) {
    if (ahead.count == 0) {
      return false;
    }
    run = ahead;
    for (find_tile(); ahead.count != 0 && ahead.first == run.first + run.count && ahead.coverage == run.coverage &&
                      ahead.cells == run.cells && run.count < kLongestRun;
         find_tile()) {
      ++run.count;
    }
    return true;
  }

  // The next tile that keeps anything goes into `ahead`.
  FASTATTN_HD constexpr void find_tile() {
    ahead.count = 0;
    while (ahead.count == 0) {
      const int block = min_of(first.block, second.block);
      if (block >= block_end) {
        return;
      }
      const int tile = max_of(next_tile, block * list.block.k / shape.k);
      next_tile = tile + 1;
      std::uint32_t cells = 0;
      int full_scores = 0;
      read_tile(first, q_first, q_split, tile, 0, cells, full_scores);
      read_tile(second, q_split, q_first + shape.q, tile, 2, cells, full_scores);
      const bool full = full_scores == shape.q * shape.k;
      ahead = {tile, cells != 0, full ? Coverage::kFull : Coverage::kPartial,
               static_cast<std::uint16_t>(full ? 0 : cells)};
    }
  }

  // Adds up what queries [q, q_end) keep of a tile, whose cells begin with cell `first_cell`, and leaves behind the
  // blocks that end in it.
  FASTATTN_HD constexpr void read_tile(BlockRowReader& reader, int q, int q_end, int tile, int first_cell,
                                       std::uint32_t& cells, int& full_scores) {
    const int k_begin = tile * shape.k, k_end = k_begin + shape.k;
    while (reader.block < block_end && reader.block * list.block.k < k_end) {
      const int k = max_of(k_begin, reader.block * list.block.k);
      const TileShape cell{q_end - q, min_of(k_end, (reader.block + 1) * list.block.k) - k};
      const Share share = list.share(q, k, cell, reader.full);
      if (share != Share::kNothing) {
        // The second column's block begins in the tile, the first one's before it or with it.
        const int i = first_cell + (reader.block * list.block.k > k_begin);
        cells |= (1u | std::uint32_t{reader.full} << kFullCells) << i;
      }
      full_scores += share == Share::kAll ? cell.q * cell.k : 0;
      const int block_end_k = (reader.block + 1) * list.block.k;
      if (block_end_k <= k_end) {
        ++reader.at;
        reader.read(list.rows, row, list.blocks_k());
      }
      if (block_end_k >= k_end) {
        break;  // without a look at the next block, which on a GPU is still on its way
      }
    }
  }
};

FASTATTN_HD constexpr BlockList::Cursor BlockList::runs(int q_tile, TileShape shape) const {
  const int q_first = q_tile * shape.q, q_last = min_of(q_first + shape.q, num_q) - 1;
  const int band_end = rows.full != nullptr ? num_k : min_of(q_last + (num_k - num_q) + right + 1, num_k);
  const int row = q_first / block.q, width = blocks_k(), block_end = ceil_div(max_of(band_end, 0), block.k);
  const int q_split = min_of((row + 1) * block.q, q_first + shape.q);
  Cursor cursor{*this, shape, row, q_first, q_split, block_end, 0, {}, {}, {}};
  cursor.first = {0, rows.count(row), 0, false};
  cursor.first.read(rows, row, width);
  const bool two_rows = q_split < q_first + shape.q && row + 1 < blocks_q();
  cursor.second = {width, two_rows ? width + rows.count(row + 1) : width, 0, false};
  cursor.second.read(rows, row, width);
  cursor.find_tile();
  return cursor;
}

// The lists of all heads, [batch, heads, rows of blocks(, blocks in a row)]; an extent of 1 is shared by all.
struct BlockLists {
  static constexpr bool kInMemory = false;  // the lists are, at() knows where
  BlockList first;                          // of batch 0 and head 0
  int batch, heads;

  // Do a tile's queries lie in one block? Else it visits what either of two rows of blocks lists.
  constexpr bool suits(TileShape tile) const { return first.block.q % tile.q == 0; }
  FASTATTN_HD constexpr BlockList slots() const { return first; }
  FASTATTN_HD constexpr BlockList at(int b, int h) const {
    const int index = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    BlockList list = first;
    list.rows.first += index * first.blocks_q();
    list.columns.first += index * first.blocks_k();
    return list;
  }
};

static_assert(TileSchedule<BlockList> && ScheduleFamily<BlockLists>);
static_assert([] {
  const std::int32_t counts[] = {1, 2, 0}, indices[] = {1, -1, 0, 1, -1, -1};
  const BlockRows rows{counts, indices, nullptr};
  return is_exact(BlockList{9, 7, 16, 0, {4, 4}, rows, {}}, {4, 4});
}());

}  // namespace fastattn
