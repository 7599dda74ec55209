// The calibration kernels in plain C++: whatever vectors the base architecture has.
#include "simd_portable.h"

#include "descend.h"
#include "gptq_round.h"
#include "rounding_errors.h"
#include "syrk.h"

namespace quantkit {

const SolverTable& generic_solvers() {
  static const SolverTable table = {"generic", gptq_kernel(), descend_kernel(), rounding_errors_row,
                                    syrk_kernel<F32Products>(), {}};
  return table;
}

}  // namespace quantkit
