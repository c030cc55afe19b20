// int8 momenta: blocks of 128 elements of a tensor, in storage order, with one float32 scale each.
//
// Included inside the namespace of a SIMD level, after rounding_rows.h. q stands for
// scale * (|q| / 127)^2 * sign(q): the square gives small elements of a block, whose sign the
// update takes, finer steps than a line would. The scale is the block's largest magnitude. -128 is
// a momentum that was not finite, and reads as NaN; it takes no part in the scale.

constexpr float kSteps = 127.0f;
constexpr float kNotFinite = -128.0f;

inline Vec magnitude(const Vec& a) {
  Vec out;
  set_bits(out, bits_of(a) & 0x7FFFFFFFu);
  return out;
}

inline float largest(const Vec& a) {
  float lanes[Vec::kLanes];
  store(lanes, a);
  for (int half = Vec::kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k)
      if (lanes[k + half] > lanes[k]) lanes[k] = lanes[k + half];
  return lanes[0];
}

inline void dequantize_block(const int8_t* q_block, float scale, float* m_block) {
  for (int k = 0; k < kBlock; k += Vec::kLanes) {
    const Vec q = load(q_block + k);
    const Vec square = multiply(multiply(q, magnitude(q)), fill(1.0f / (kSteps * kSteps)));
    Vec m = multiply(square, fill(scale));
    const uint32_t bad = negative(fma(q, fill(1.0f), fill(kSteps + 0.5f)));
    if (bad != 0) m = select(bad, fill(NAN), m);
    store(m_block + k, m);
  }
}

inline void quantize_block(const float* m_block, int8_t* q_block, float* scale) {
  Vec top = fill(0.0f);
  for (int k = 0; k < kBlock; k += Vec::kLanes) {
    const Vec m = load(m_block + k), size = magnitude(m);
    const uint32_t ok = finite(m);
    top = maximum(top, ok == kAllLanes ? size : select(ok, size, Vec{}));
  }
  *scale = largest(top);
  // The roots of all float32, subnormals too, are normal numbers: nothing here can overflow.
  const Vec steps = fill(*scale > 0.0f ? kSteps / __builtin_sqrtf(*scale) : 0.0f);
  for (int k = 0; k < kBlock; k += Vec::kLanes) {
    const Vec m = load(m_block + k);
    const uint32_t ok = finite(m);
    Vec q = multiply(square_root(magnitude(m)), steps);
    set_bits(q, bits_of(q) | (bits_of(m) & 0x80000000u));
    if (ok != kAllLanes) q = select(ok, q, fill(kNotFinite));
    store(q_block + k, q);
  }
}

void dequantize_row(const int8_t* q, const float* scales, int64_t n, float* m) {
  for (; n >= kBlock; n -= kBlock, q += kBlock, ++scales, m += kBlock)
    dequantize_block(q, *scales, m);
  if (n == 0) return;
  int8_t padded_q[kBlock] = {};
  float padded_m[kBlock];
  std::memcpy(padded_q, q, static_cast<size_t>(n));
  dequantize_block(padded_q, *scales, padded_m);
  std::memcpy(m, padded_m, static_cast<size_t>(n) * sizeof(float));
}

void quantize_row(const float* m, int64_t n, int8_t* q, float* scales) {
  for (; n >= kBlock; n -= kBlock, q += kBlock, ++scales, m += kBlock) quantize_block(m, q, scales);
  if (n == 0) return;
  int8_t padded_q[kBlock];
  float padded_m[kBlock] = {};
  std::memcpy(padded_m, m, static_cast<size_t>(n) * sizeof(float));
  quantize_block(padded_m, padded_q, scales);
  std::memcpy(q, padded_q, static_cast<size_t>(n));
}
