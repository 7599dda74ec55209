// The bf16 products for AVX-512 BF16; everything else is as on AVX-512.
#include "simd_avx512.h"

#include "syrk.h"

namespace quantkit {

const SolverTable& avx512bf16_solvers() {
  static const SolverTable table = [] {
    SolverTable t = avx512_solvers();
    t.name = "avx512bf16";
    t.syrk_bf16 = syrk_kernel<Bf16Products>();
    return t;
  }();
  return table;
}

}  // namespace quantkit
