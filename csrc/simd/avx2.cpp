// The kernels for x86-64 with AVX2, chosen at run time.
#if defined(__x86_64__)
#define LION_SIMD_AVX2
#include "simd/kernels.h"

namespace lion {

const SimdLevel* avx2_level() {
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &avx2::kLevel : nullptr;
}

}  // namespace lion

#else

#include "simd/interface.h"

const lion::SimdLevel* lion::avx2_level() { return nullptr; }

#endif
