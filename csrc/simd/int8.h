// int8 momenta: blocks of 128 elements of a tensor, in storage order, with one float32 scale each.
//
// q stands for scale * (|q| / 127)^2 * sign(q): the square gives small elements of a block, whose
// sign the update takes, finer steps than a line would. The scale is the block's largest magnitude.
// -128 is a momentum that was not finite, and reads as NaN; it takes no part in the scale. Scales
// may lie at any address, as in a file in memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd/interface.h"
#include "simd/target.h"
#include "simd/vec.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

constexpr float kLargest = 127.0f;

// Whether any of the block is -128, eight at a time: a zero byte is what borrows.
LION_INLINE bool has_not_finite(const int8_t* q_block) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t words[kBlock / 8], zero = 0;
  std::memcpy(words, q_block, kBlock);
  for (uint64_t word : words) {
    const uint64_t other = word ^ (128 * kOnes);
    zero |= (other - kOnes) & ~other;
  }
  return (zero & (128 * kOnes)) != 0;
}

LION_INLINE void dequantize_block(const int8_t* q_block, const float* scale_data, float* m_block) {
  float scale;
  std::memcpy(&scale, scale_data, sizeof(scale));
  for (int k = 0; k < kBlock; k += Vec::kLanes) {
    const Vec q = load(q_block + k);
    const Vec square = multiply(multiply(q, magnitude(q)), fill(1.0f / (kLargest * kLargest)));
    store(m_block + k, multiply(square, fill(scale)));
  }
  if (has_not_finite(q_block))
    for (int k = 0; k < kBlock; ++k)
      if (q_block[k] == -128) m_block[k] = NAN;
}

LION_INLINE float largest_of(const float* m_block) {
  Vec top = magnitude(load(m_block));
  for (int k = Vec::kLanes; k < kBlock; k += Vec::kLanes)
    top = maximum(top, magnitude(load(m_block + k)));
  return largest(top);
}

LION_INLINE void quantize_block(const float* m_block, int8_t* q_block, float* scale) {
  alignas(64) float finite_block[kBlock];
  const float* source = m_block;
  float top = largest_of(m_block);
  const bool is_finite = top < INFINITY;
  if (!is_finite) {
    for (int k = 0; k < kBlock; k += Vec::kLanes) {
      const Vec m = load(m_block + k);
      store(finite_block + k, select(finite(m), m, Vec{}));
    }
    source = finite_block;
    top = largest_of(source);
  }
  std::memcpy(scale, &top, sizeof(top));
  // The roots of all float32, subnormals too, are normal numbers: nothing here can overflow.
  const Vec steps = fill(top > 0.0f ? kLargest / __builtin_sqrtf(top) : 0.0f);
  for (int k = 0; k < kBlock; k += Vec::kLanes) {
    const Vec m = load(source + k);
    Vec q = multiply(square_root(magnitude(m)), steps);
    set_bits(q, bits_of(q) | (bits_of(m) & 0x80000000u));
    store(q_block + k, q);
  }
  if (!is_finite)
    for (int k = 0; k < kBlock; ++k)
      if (m_block[k] - m_block[k] != 0.0f) q_block[k] = -128;
}

LION_INLINE void dequantize_run(const int8_t* q, const float* block_scales, int64_t n, float* m) {
  for (; n >= kBlock; n -= kBlock, q += kBlock, ++block_scales, m += kBlock)
    dequantize_block(q, block_scales, m);
  if (n == 0) return;
  int8_t padded_q[kBlock] = {};
  float padded_m[kBlock];
  std::memcpy(padded_q, q, static_cast<size_t>(n));
  dequantize_block(padded_q, block_scales, padded_m);
  std::memcpy(m, padded_m, static_cast<size_t>(n) * sizeof(float));
}

LION_INLINE void quantize_run(const float* m, int64_t n, int8_t* q, float* block_scales) {
  for (; n >= kBlock; n -= kBlock, q += kBlock, ++block_scales, m += kBlock)
    quantize_block(m, q, block_scales);
  if (n == 0) return;
  int8_t padded_q[kBlock];
  float padded_m[kBlock] = {};
  std::memcpy(padded_m, m, static_cast<size_t>(n) * sizeof(float));
  quantize_block(padded_m, padded_q, block_scales);
  std::memcpy(q, padded_q, static_cast<size_t>(n));
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
