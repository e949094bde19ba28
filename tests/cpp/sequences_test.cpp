// The laws of SequenceBands: tiles that hold every query once, and exact masks of each sequence.
#include "fastattn/schedule/sequences.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "check.hpp"
#include "turns.hpp"

using namespace fastattn;

namespace {

std::vector<std::int32_t> ends(const std::vector<int>& lengths) {
  std::vector<std::int32_t> cu_seqlens{0};
  for (const int length : lengths) {
    cu_seqlens.push_back(cu_seqlens.back() + length);
  }
  return cu_seqlens;
}

const std::vector<std::vector<int>> kLengths = {
    {0}, {5}, {0, 0, 0}, {1, 1, 1, 1}, {7, 0, 8, 9, 0}, {16, 16}, {3, 40, 0, 0, 1, 15}, {0, 33, 31}};

const Test every_token_once("sequences: the tiles hold every query and every key once, and none that is not there", [] {
  for (const std::vector<int>& lengths : kLengths) {
    for (const int unused : {0, 1, 20}) {  // tokens after the last sequence
      for (const TileShape tile : {TileShape{1, 4}, {4, 4}, {8, 4}, {16, 8}, {64, 8}}) {
        const std::vector<std::int32_t> cu_seqlens = ends(lengths);
        const int tokens = cu_seqlens.back() + unused, count = static_cast<int>(lengths.size());
        const SequenceBands schedules{{{tokens, tokens, tokens, 0}},
                                      count,
                                      tokens,
                                      tokens,
                                      cu_seqlens.data(),
                                      cu_seqlens.data(),
                                      nullptr,
                                      nullptr};
        std::vector<int> queries(static_cast<std::size_t>(tokens)), keys(queries);
        for (int i = 0; i < num_q_tiles(schedules, tile); ++i) {
          const auto [sequence, q_tile] = sequence_tile(schedules, 0, i, tile);
          for (int row = 0; row < tile.q; ++row) {
            if (const int token = schedules.at(sequence, 0).query_token(q_tile, row, tile); token >= 0) {
              ++queries[static_cast<std::size_t>(token)];
            }
          }
        }
        for (int i = 0; i < num_k_tiles(schedules, tile); ++i) {
          const auto [sequence, k_tile] = sequence_key_tile(schedules, 0, i, tile);
          for (int column = 0; column < tile.k; ++column) {
            if (const int token = slots_of(schedules, sequence).key_token(k_tile * tile.k + column); token >= 0) {
              ++keys[static_cast<std::size_t>(token)];
            }
          }
        }
        for (const std::vector<int>& tiles_of_tokens : {queries, keys}) {
          for (const int tiles : tiles_of_tokens) {
            check(tiles == 1, "a token is in one tile");
          }
        }
      }
    }
  }
});

const Test exact_in_each_sequence("sequences: each kept score is in one tile, whatever is used", [] {
  for (const std::vector<int>& lengths : kLengths) {
    const std::vector<std::int32_t> cu_seqlens = ends(lengths);
    std::vector<std::int32_t> used;
    for (const int length : lengths) {
      used.push_back(length - length / 3);
    }
    const int tokens = cu_seqlens.back(), count = static_cast<int>(lengths.size());
    for (const int right : {0, 3, tokens}) {
      for (const std::int32_t* used_q : std::vector<const std::int32_t*>{nullptr, used.data()}) {
        const SequenceBands schedules{{{tokens, tokens, tokens, right}},
                                      count,
                                      tokens,
                                      tokens,
                                      cu_seqlens.data(),
                                      cu_seqlens.data(),
                                      used_q,
                                      used.data()};
        for (int sequence = 0; sequence < count; ++sequence) {
          const SequenceBand band = schedules.at(sequence, 0);
          for (const TileShape tile : {TileShape{4, 4}, {8, 4}, {16, 8}}) {
            check(is_exact(band, tile), "sequence " + std::to_string(sequence));
            check(is_exact(band.transposed(), tile), "transposed sequence " + std::to_string(sequence));
            check_turns(band, tile, "sequence " + std::to_string(sequence));
            const SequenceOrigin origin = band.key_origin(1, tile);
            check(
                origin.rows >= 0 && tile.k + origin.rows <= std::max(tile.k, used[static_cast<std::size_t>(sequence)]),
                "no key that is not used");
          }
        }
      }
    }
  }
});

const Test cut_off("sequences: what contradicts the tensors is cut off", [] {
  for (const std::vector<std::int32_t>& cu_seqlens :
       {std::vector<std::int32_t>{0, 900}, {-70, 90, 200}, {0, 150, 20, 200}, {0, 2147483647, 5}, {-5, -3, -9}}) {
    const int count = static_cast<int>(cu_seqlens.size()) - 1, tokens = 200;
    const std::vector<std::int32_t> used(cu_seqlens.size(), 1 << 30);
    const SequenceBands schedules{{{tokens, tokens, tokens, tokens}},
                                  count,
                                  tokens,
                                  tokens,
                                  cu_seqlens.data(),
                                  cu_seqlens.data(),
                                  used.data(),
                                  used.data()};
    for (int sequence = 0; sequence < count; ++sequence) {
      const SequenceBand band = schedules.at(sequence, 0);
      check(band.first_query >= 0 && band.num_q >= 0 && band.first_query + band.num_q <= tokens, "queries");
      check(band.first_key >= 0 && band.num_k >= 0 && band.first_key + band.num_k <= tokens, "keys");
      check(band.band.num_q >= 0 && band.band.num_q <= band.num_q, "used queries");
      check(band.band.num_k >= 0 && band.band.num_k <= band.num_k, "used keys");
    }
  }
});

}  // namespace
