// The kernels for any machine, in the vector types of GCC and Clang: as wide as the baseline
// goes.
#include "simd/kernels.h"

namespace lion {

const SimdLevel* portable_level() { return &portable::kLevel; }

}  // namespace lion
