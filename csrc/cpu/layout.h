// Where the codes of a block of 16 rows lie in a packed weight; see quantkit.h for the picture.
// In an anonymous namespace for the reason given in numeric.h.
#pragma once

#include <cstdint>

#include "quantkit/quantkit.h"

namespace quantkit {
namespace {

// Rows of a weight matrix are handled 16 at a time: one 512-bit vector of fp32 accumulators.
constexpr int64_t kBlockRows = 16;
// One 64-byte chunk of a packed block holds 16 rows x 4 bytes: 8 codes of 4 bits, 4 of 8, two bf16
// values or one fp32 value.
constexpr int64_t kChunkBytes = 64;
// Chunks of up to four neighbouring blocks alternate, so that a tile of four is one run of memory.
constexpr int64_t kBlocksTogether = 4;

[[maybe_unused]] constexpr int64_t chunk_codes(int32_t format) {
  switch (format) {
    case QK_W4: return 8;
    case QK_B16: return 2;
    case QK_F32W: return 1;
    default: return 4;
  }
}
[[maybe_unused]] constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The chunks of one block: chunk c is at base + c * step. The next block of the same four is
// kChunkBytes further.
struct PackedBlock {
  int64_t base, step;
};

[[maybe_unused]] constexpr PackedBlock packed_block(int64_t block, int64_t blocks, int64_t chunks) {
  const int64_t first = block - block % kBlocksTogether;
  const int64_t together = blocks - first < kBlocksTogether ? blocks - first : kBlocksTogether;
  return {(first * chunks + block % kBlocksTogether) * kChunkBytes, together * kChunkBytes};
}

// The largest of 4, 2 and 1 blocks from `block` on that do not leave its four, `left` or `widest`.
[[maybe_unused]] constexpr int64_t blocks_at_once(int64_t block, int64_t left, int64_t widest) {
  int64_t room = kBlocksTogether - block % kBlocksTogether;
  room = left < room ? left : room;
  room = widest < room ? widest : room;
  return room >= 4 ? 4 : (room >= 2 ? 2 : 1);
}

}  // namespace
}  // namespace quantkit
