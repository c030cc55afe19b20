// What this machine can do: plain loops with the reads and writes of each kernel and nothing more,
// compiled for exactly this machine by bench/cpu.py. `out` arrays may be inputs too.
#include <cstdint>
#include <cstring>

namespace {

struct BF16 {
  uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline void put(float& out, float x) { out = x; }
inline void put(BF16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// lion_step: reads p, g, m; writes p, m.
template <class T>
void read3_write2(T* p, const T* g, T* m, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    put(p[i], 0.5f * get(p[i]) + 0.25f * get(m[i]));
    put(m[i], 0.5f * get(m[i]) + 0.5f * get(g[i]));
  }
}

// encode: reads g, m; writes m (and one bit, not written here: 1/96 of the bytes in fp32).
template <class T>
void read2_write1(const T* g, T* m, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) put(m[i], 0.5f * get(m[i]) + 0.5f * get(g[i]));
}

// apply: reads and writes p (and reads one bit, not read here: 1/64 of the bytes in fp32).
template <class T>
void read1_write1(T* p, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) put(p[i], 0.5f * get(p[i]) + 0.25f);
}

}  // namespace

extern "C" {

void copy(const float* a, float* out, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) out[i] = a[i];
}

void read3_write2(float* p, const float* g, float* m, int64_t n) {
  read3_write2<float>(p, g, m, n);
}
void read2_write1(const float* g, float* m, int64_t n) { read2_write1<float>(g, m, n); }
void read1_write1(float* p, int64_t n) { read1_write1<float>(p, n); }

void read3_write2_bf16(BF16* p, const BF16* g, BF16* m, int64_t n) {
  read3_write2<BF16>(p, g, m, n);
}
void read2_write1_bf16(const BF16* g, BF16* m, int64_t n) { read2_write1<BF16>(g, m, n); }
void read1_write1_bf16(BF16* p, int64_t n) { read1_write1<BF16>(p, n); }
}
