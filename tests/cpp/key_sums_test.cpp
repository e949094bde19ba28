// Which gradients of grouped keys are sums in memory: where that pays, and only where they have room.
#include "sm90/key_sums.hpp"

#include <cstdint>

#include "check.hpp"

using namespace fastattn;

namespace {

constexpr TensorView view(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t head_dim) {
  return {.shape = {batch, seq, heads, head_dim},
          .stride = {seq * heads * head_dim, heads * head_dim, head_dim, 1},
          .dtype = DType::kBFloat16};
}

// Of `seq` queries and keys, on a chip of 132 multiprocessors, with tiles of 128 keys.
constexpr bool sums(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t kv_heads, int head_dim) {
  const TensorView q = view(batch, seq, heads, head_dim);
  return sm90::sums_keys_in_memory(q, view(batch, seq, kv_heads, head_dim), q, (seq + 127) / 128, 128, head_dim, 132);
}

const Test pays("sums of keys: with few key tiles, or groups that the cache does not hold", [] {
  check(sums(1, 2048, 64, 8, 128), "64 heads on 8, 128 tiles");
  check(sums(1, 1024, 32, 8, 128), "32 heads on 8, 64 tiles");
  check(!sums(2, 2048, 32, 8, 128), "32 heads on 8, 256 tiles of rows that the cache holds");
  check(sums(2, 8192, 64, 8, 128) && sums(2, 8192, 32, 4, 128), "groups of 64 MiB");
  check(!sums(2, 8192, 32, 8, 128), "of 32 MiB");
  check(!sums(1, 1024, 8, 8, 128) && !sums(1, 1024, 0, 2, 128), "heads of their own, and none");
});

const Test room("sums of keys: as much as dQ has room for", [] {
  check(sums(1, 1024, 32, 8, 128) && !sums(1, 1024, 24, 8, 128), "groups of four, and of three");
  check(!sums(1, 1000, 32, 8, 128), "of four with a tile that is not full");
  const TensorView q = view(1, 1024, 32, 128), k = view(1, 1024, 4, 128);
  TensorView strided = q;
  strided.stride[1] *= 2;
  check(sm90::sums_keys_in_memory(q, k, q, 8, 128, 128, 132), "contiguous");
  check(!sm90::sums_keys_in_memory(q, k, strided, 8, 128, 128, 132), "with something between its rows");
  check(!sm90::sums_keys_in_memory(q, k, view(1, 1024, 32, 40), 8, 128, 128, 132), "narrower rows than the tiles'");
});

}  // namespace
