// The bf16 product for AVX-512 BF16 and VBMI; everything else is as on AVX-512.
#include "simd_avx512bf16.h"

#include "attention.h"

namespace quantkit {

const KernelTable& avx512bf16_kernels() {
  static const KernelTable table = [] {
    KernelTable t = avx512_kernels();
    t.name = "avx512bf16";
    t.bf16 = weight_only_kernel<Bf16Math, W4ToBf16, I8ToBf16, F8ToBf16, B16ToBf16, void>();
    t.attention_bf16 = attention_kernel<Bf16Math, void, B16ToBf16, I8ToBf16, F8ToBf16>();
    return t;
  }();
  return table;
}

}  // namespace quantkit
