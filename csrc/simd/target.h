// Which SIMD level a translation unit compiles: LION_SIMD_AVX512, LION_SIMD_AVX2, or by default
// what every machine has.
//
// A header of a level stands between LION_SIMD_BEGIN and LION_SIMD_END, which raise the compiler's
// target and lower it again, in the namespace lion::LION_SIMD_LEVEL, and includes what it needs
// before: an inline function of the standard library that was compiled for a raised target could
// replace its namesake in the whole program, and fail on a machine that lacks the instructions.
#pragma once

#if defined(LION_SIMD_AVX512)
#define LION_SIMD_LEVEL avx512
#define LION_SIMD_NAME "avx512"
#define LION_SIMD_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt"
#elif defined(LION_SIMD_AVX2)
#define LION_SIMD_LEVEL avx2
#define LION_SIMD_NAME "avx2"
#define LION_SIMD_TARGET "avx2,fma,f16c,bmi,bmi2,popcnt"
#else
#define LION_SIMD_LEVEL portable
#define LION_SIMD_NAME "portable"
#endif

#define LION_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define LION_PRAGMA(...) LION_PRAGMA_TEXT(__VA_ARGS__)

#if !defined(LION_SIMD_TARGET)
#define LION_SIMD_BEGIN
#define LION_SIMD_END
#elif defined(__clang__)
#define LION_SIMD_BEGIN \
  LION_PRAGMA(clang attribute push(__attribute__((target(LION_SIMD_TARGET))), apply_to = function))
#define LION_SIMD_END LION_PRAGMA(clang attribute pop)
#else
#define LION_SIMD_BEGIN LION_PRAGMA(GCC push_options) LION_PRAGMA(GCC target(LION_SIMD_TARGET))
#define LION_SIMD_END LION_PRAGMA(GCC pop_options)
#endif

// Of what a loop over words is made of: left to choose, a compiler stops to inline when a level has
// grown, and a call in such a loop costs a fifth of its time. Where there are no vectors, loops of
// scalars stand in its place, and inlining all of them doubles the time of the build.
#if defined(LION_SIMD_TARGET)
#define LION_INLINE inline __attribute__((always_inline))
#else
#define LION_INLINE inline
#endif
