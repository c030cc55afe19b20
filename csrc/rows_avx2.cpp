// The row kernels for x86-64 with AVX2, chosen at run time.
#include "rows_includes.h"

namespace lion {

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace avx2 {
#define LION_SIMD_AVX2
#define LION_SIMD_NAME "avx2"
#include "row_table.h"
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const RowKernels* avx2_rows() {
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &avx2::kRows : nullptr;
}

#else

const RowKernels* avx2_rows() { return nullptr; }

#endif

}  // namespace lion
