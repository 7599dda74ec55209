// The calibration kernels for AVX2 + FMA + F16C.
#include "simd_portable.h"

#include "descend.h"
#include "gptq_round.h"
#include "rounding_errors.h"
#include "syrk.h"

namespace quantkit {

const SolverTable& avx2_solvers() {
  static const SolverTable table = {"avx2", gptq_kernel(), descend_kernel(), rounding_errors_row,
                                    syrk_kernel<F32Products>(), {}};
  return table;
}

}  // namespace quantkit
