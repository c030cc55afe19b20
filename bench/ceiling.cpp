// What this machine can do: plain loops with the reads and writes of each kernel and nothing more,
// compiled for exactly this machine by bench/cpu.py. `out` arrays may be inputs too.
#include <cstdint>

extern "C" {

void copy(const float* a, float* out, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) out[i] = a[i];
}

// lion_step: reads p, g, m; writes p, m.
void read3_write2(float* p, const float* g, float* m, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    p[i] = 0.5f * p[i] + 0.25f * m[i];
    m[i] = 0.5f * m[i] + 0.5f * g[i];
  }
}

// encode: reads g, m; writes m (and one bit, not written here: 1/96 of the bytes).
void read2_write1(const float* g, float* m, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) m[i] = 0.5f * m[i] + 0.5f * g[i];
}

// apply: reads and writes p (and reads one bit, not read here: 1/64 of the bytes).
void read1_write1(float* p, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) p[i] = 0.5f * p[i] + 0.25f;
}
}
