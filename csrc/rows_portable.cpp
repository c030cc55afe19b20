// The row kernels for any machine, in the vector types of GCC and Clang: as wide as the baseline
// goes.
#include "rows_includes.h"

namespace lion {
namespace portable {
#define LION_SIMD_NAME "portable"
#include "row_table.h"
}  // namespace portable

const RowKernels* portable_rows() { return &portable::kRows; }

}  // namespace lion
