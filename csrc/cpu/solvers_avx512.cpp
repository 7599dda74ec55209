// The calibration kernels for AVX-512 F, BW, DQ and VL.
#include "simd_avx512.h"

#include "descend.h"
#include "gptq_round.h"
#include "rounding_errors.h"
#include "syrk.h"

namespace quantkit {

const SolverTable& avx512_solvers() {
  static const SolverTable table = {"avx512", gptq_kernel(), descend_kernel(), rounding_errors_row,
                                    syrk_kernel<F32Products>(), {}};
  return table;
}

}  // namespace quantkit
