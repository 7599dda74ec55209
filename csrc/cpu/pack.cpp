// Codes to the packed layouts described in quantkit.h. Runs once a layer, when it is loaded.
#include <cstring>

#include "kernel_table.h"
#include "thread_pool.h"

namespace quantkit {
namespace {

void pack_w4_block(const uint8_t* codes, int64_t ldc, int64_t rows, int64_t k, uint8_t* out,
                   int64_t step) {
  for (int64_t c = 0; c < ceil_div(k, 8); ++c, out += step) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      uint32_t word = 0;
      for (int64_t j = 0; r < rows && j < 8 && 8 * c + j < k; ++j) {
        const uint32_t code = codes[r * ldc + 8 * c + j] & 15u;
        word |= code << (4 * (j / 2) + 16 * (j & 1));
      }
      std::memcpy(out + 4 * r, &word, 4);
    }
  }
}

void pack_w8_block(const uint8_t* codes, int64_t ldc, int64_t rows, int64_t k, uint8_t* out,
                   int64_t step) {
  for (int64_t c = 0; c < ceil_div(k, 4); ++c, out += step) {
    std::memset(out, 0, kChunkBytes);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = k - 4 * c < 4 ? k - 4 * c : 4;
      std::memcpy(out + 4 * r, codes + r * ldc + 4 * c, static_cast<size_t>(n));
    }
  }
}

// Values of `bytes` bytes, 4 / bytes of them in a row of a chunk.
template <int64_t kBytes>
void pack_float_block(const uint8_t* values, int64_t ldv, int64_t rows, int64_t k, uint8_t* out,
                      int64_t step) {
  constexpr int64_t kCodes = 4 / kBytes;
  for (int64_t c = 0; c < ceil_div(k, kCodes); ++c, out += step) {
    std::memset(out, 0, kChunkBytes);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = k - kCodes * c < kCodes ? k - kCodes * c : kCodes;
      std::memcpy(out + 4 * r, values + (r * ldv + kCodes * c) * kBytes,
                  static_cast<size_t>(n * kBytes));
    }
  }
}

using PackBlock = void (*)(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t);

int pack(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, uint8_t* packed, int32_t format,
         PackBlock pack_block, int64_t bytes = 1) {
  if (n < 0 || k < 0 || ldc < k) return QK_INVALID_ARGUMENT;
  if (n == 0 || k == 0) return QK_OK;
  if (codes == nullptr || packed == nullptr) return QK_INVALID_ARGUMENT;
  const int64_t blocks = ceil_div(n, kBlockRows), chunks = ceil_div(k, chunk_codes(format));
  parallel_for(blocks, [&](int64_t block) {
    const PackedBlock at = packed_block(block, blocks, chunks);
    const int64_t row = block * kBlockRows;
    const int64_t rows = n - row < kBlockRows ? n - row : kBlockRows;
    pack_block(codes + row * ldc * bytes, ldc, rows, k, packed + at.base, at.step);
  });
  return QK_OK;
}

}  // namespace
}  // namespace quantkit

using namespace quantkit;

int64_t qk_packed_bytes(int32_t format, int64_t n, int64_t k) {
  return ceil_div(n, kBlockRows) * ceil_div(k, chunk_codes(format)) * kChunkBytes;
}

int qk_pack_w4(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, uint8_t* packed) {
  return pack(codes, ldc, n, k, packed, QK_W4, pack_w4_block);
}

int qk_pack_w8(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, uint8_t* packed) {
  return pack(codes, ldc, n, k, packed, QK_I8, pack_w8_block);
}

int qk_pack_float(const void* values, int32_t dtype, int64_t ldv, int64_t n, int64_t k,
                  void* packed) {
  const uint8_t* from = static_cast<const uint8_t*>(values);
  uint8_t* to = static_cast<uint8_t*>(packed);
  if (dtype == QK_BF16) return pack(from, ldv, n, k, to, QK_B16, pack_float_block<2>, 2);
  if (dtype == QK_F32) return pack(from, ldv, n, k, to, QK_F32W, pack_float_block<4>, 4);
  return QK_UNSUPPORTED;
}
