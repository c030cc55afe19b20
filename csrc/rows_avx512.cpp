// The row kernels for x86-64 with AVX-512, chosen at run time.
#include "rows_includes.h"

namespace lion {

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace avx512 {
#define LION_SIMD_AVX512
#define LION_SIMD_NAME "avx512"
#include "row_table.h"
}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const RowKernels* avx512_rows() {
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported ? &avx512::kRows : nullptr;
}

#else

const RowKernels* avx512_rows() { return nullptr; }

#endif

}  // namespace lion
