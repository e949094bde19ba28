// Sequences of many lengths, one after the other in the same tensors ("varlen"): a band over each.
#pragma once

#include <cstdint>

#include "fastattn/schedule/band.hpp"

namespace fastattn {

// Where a tile's first token lies, and how many of the tile's rows there are from there to the end of its sequence:
// what comes after is another's.
struct SequenceOrigin {
  int token, rows;
};

// A band over one sequence. Slots are the sequence's tokens; those past the band's see nothing and are not seen.
struct SequenceBand {
  int num_q, num_k;
  int first_query, first_key;  // tokens of the tensors
  Band band;

  FASTATTN_HD constexpr bool keeps(int q, int k) const { return band.keeps(q, k); }
  FASTATTN_HD constexpr bool is_blind(int q) const { return band.is_blind(q); }
  // A tile past the band's queries visits nothing; the band, which has no such tiles, would visit some in vain.
  FASTATTN_HD constexpr Band::Cursor runs(int q_tile, TileShape shape) const {
    return q_tile * shape.q < band.num_q ? band.runs(q_tile, shape) : Band::Cursor{0, 0, 0, 0};
  }
  FASTATTN_HD constexpr int last_k_tile(int q_tile, TileShape shape) const { return band.last_k_tile(q_tile, shape); }
  FASTATTN_HD constexpr Band::TileMask tile_mask(int q_tile, int k_tile, TileShape shape, std::uint16_t cells) const {
    return band.tile_mask(q_tile, k_tile, shape, cells);
  }

  FASTATTN_HD constexpr int query_token(int slot) const { return slot < num_q ? first_query + slot : -1; }
  FASTATTN_HD constexpr int query_token(int q_tile, int row, TileShape shape) const {
    return query_token(q_tile * shape.q + row);
  }
  FASTATTN_HD constexpr int key_token(int slot) const { return slot < num_k ? first_key + slot : -1; }
  // Rows of the band alone: the others are zeros, whatever the tensors hold there.
  FASTATTN_HD constexpr SequenceOrigin query_origin(int q_tile, TileShape shape) const {
    const int slot = q_tile * shape.q;
    return {first_query + slot, max_of(band.num_q - slot, 0)};
  }
  FASTATTN_HD constexpr SequenceOrigin key_origin(int k_tile, TileShape shape) const {
    const int slot = k_tile * shape.k;
    return {first_key + slot, max_of(band.num_k - slot, 0)};
  }
  constexpr int query_box(TileShape shape) const { return shape.q; }
  constexpr int key_box(TileShape shape) const { return shape.k; }

  FASTATTN_HD constexpr SequenceBand transposed() const {
    return {num_k, num_q, first_key, first_query, band.transposed()};
  }
};

// The bands of all sequences, which share one batch entry of the tensors.
struct SequenceBands {
  static constexpr bool kInMemory = true;
  Bands of_longest;  // with sides that are wide enough for every sequence
  int count;
  int tokens_q, tokens_k;  // of the tensors
  // In memory of the device: sequence s has the tokens from cu_seqlens[s] to cu_seqlens[s + 1] [count + 1], of which
  // the first seqused[s] [count] are used; null: all. What lies outside the tensors is cut off; tokens after the last
  // sequence belong to it, unused.
  const std::int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k;

  constexpr bool suits(TileShape tile) const { return of_longest.suits(tile); }
  FASTATTN_HD constexpr Band slots() const { return of_longest.slots(); }

  FASTATTN_HD constexpr SequenceBand at(int sequence, int head) const {
    return in_sequence(sequence, of_longest.at(0, head));
  }
  FASTATTN_HD constexpr SequenceBand slots_of(int sequence) const { return in_sequence(sequence, slots()); }

  // The first tile of a sequence among those of all: the tokens before it fill no more than that many, and one that is
  // not full for each sequence.
  FASTATTN_HD constexpr int first_tile(int sequence, TileShape tile) const {
    return clamp(cu_seqlens_q[sequence], tokens_q) / tile.q + sequence;
  }
  FASTATTN_HD constexpr int first_key_tile(int sequence, TileShape tile) const {
    return clamp(cu_seqlens_k[sequence], tokens_k) / tile.k + sequence;
  }

  // The last sequence whose first tile, by first_of(sequence), is not after `tile`.
  template <class FirstOf>
  FASTATTN_HD constexpr int sequence_of(int tile, FirstOf&& first_of) const {
    int sequence = 0, end = count;  // it lies before `end`
    while (sequence + 1 < end) {
      const int middle = (sequence + end) / 2;
      (first_of(middle) <= tile ? sequence : end) = middle;
    }
    return sequence;
  }

 private:
  FASTATTN_HD constexpr SequenceBand in_sequence(int sequence, Band band) const {
    const Interval q = tokens(cu_seqlens_q, sequence, tokens_q), k = tokens(cu_seqlens_k, sequence, tokens_k);
    const bool last = sequence + 1 == count;
    return {(last ? tokens_q : q.end) - q.begin,
            (last ? tokens_k : k.end) - k.begin,
            q.begin,
            k.begin,
            {used(seqused_q, sequence, q), used(seqused_k, sequence, k), band.left, band.right}};
  }
  FASTATTN_HD static constexpr int clamp(int token, int tokens) { return min_of(max_of(token, 0), tokens); }
  FASTATTN_HD static constexpr Interval tokens(const std::int32_t* cu_seqlens, int sequence, int tokens) {
    const int begin = clamp(cu_seqlens[sequence], tokens);
    return {begin, max_of(clamp(cu_seqlens[sequence + 1], tokens), begin)};
  }
  FASTATTN_HD static constexpr int used(const std::int32_t* seqused, int sequence, Interval tokens) {
    const int length = tokens.end - tokens.begin;
    return seqused == nullptr ? length : clamp(seqused[sequence], length);
  }
};

// How the executors go through the sequences; see schedule.hpp.

FASTATTN_HD constexpr int num_q_tiles(const SequenceBands& schedules, TileShape tile) {
  return schedules.tokens_q / tile.q + schedules.count;
}
FASTATTN_HD constexpr SequenceTile sequence_tile(const SequenceBands& schedules, int, int q_tile, TileShape tile) {
  const int sequence = schedules.sequence_of(q_tile, [&](int s) { return schedules.first_tile(s, tile); });
  return {sequence, q_tile - schedules.first_tile(sequence, tile)};
}
FASTATTN_HD constexpr int first_q_tile(const SequenceBands& schedules, int sequence, TileShape tile) {
  return schedules.first_tile(sequence, tile);
}
FASTATTN_HD constexpr int batch_of(const SequenceBands&, int) { return 0; }

FASTATTN_HD constexpr int num_k_tiles(const SequenceBands& schedules, TileShape tile) {
  return schedules.tokens_k / tile.k + schedules.count;
}
FASTATTN_HD constexpr SequenceKeyTile sequence_key_tile(const SequenceBands& schedules, int, int k_tile,
                                                        TileShape tile) {
  const int sequence = schedules.sequence_of(k_tile, [&](int s) { return schedules.first_key_tile(s, tile); });
  return {sequence, k_tile - schedules.first_key_tile(sequence, tile)};
}
FASTATTN_HD constexpr SequenceBand slots_of(const SequenceBands& schedules, int sequence) {
  return schedules.slots_of(sequence);
}

static_assert(ReversibleSchedule<SequenceBand> && ScheduleFamily<SequenceBands>);
static_assert(is_exact(SequenceBand{19, 25, 100, 200, {17, 22, 6, 0}}, {8, 4}));

}  // namespace fastattn
