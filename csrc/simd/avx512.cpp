// The kernels for x86-64 with AVX-512, chosen at run time.
#if defined(__x86_64__)
#define LION_SIMD_AVX512
#include "simd/kernels.h"

namespace lion {

const SimdLevel* avx512_level() {
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported ? &avx512::kLevel : nullptr;
}

}  // namespace lion

#else

#include "simd/interface.h"

const lion::SimdLevel* lion::avx512_level() { return nullptr; }

#endif
