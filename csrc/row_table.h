// The body of rows_*.cpp: every row kernel of one SIMD level, and the table that names them.
// The including file has opened the level's namespace and set LION_SIMD_NAME.

#include "simd.h"

constexpr uint32_t kAllLanes = static_cast<uint32_t>((1ull << Vec::kLanes) - 1);

template <class T>
inline void copy_back(const T* edge, T* data, size_t count) {
  std::memcpy(data, edge, count * sizeof(T));
}
template <class T>
inline void copy_back(const T*, const T*, size_t) {}

#include "lion_rows.h"
#include "momentum_rows.h"
#include "tally_rows.h"

// The momentum's types; the parameter's; every rounding. float32 parameters drop nothing.
#define LION_MOMENTA(plain, rounding, P)                                    \
  {step_row<plain, rounding, P, float>, step_row<plain, rounding, P, BF16>, \
   step_row<plain, rounding, P, F16>}
#define LION_TYPES(plain, rounding)                                           \
  {LION_MOMENTA(plain, kNearest, float), LION_MOMENTA(plain, rounding, BF16), \
   LION_MOMENTA(plain, rounding, F16)}
#define LION_STEPS(plain) \
  {LION_TYPES(plain, kNearest), LION_TYPES(plain, kStochastic), LION_TYPES(plain, kCompensated)}
#define LION_APPLIES(cautious, rounding)                                      \
  {apply_row<cautious, kNearest, float>, apply_row<cautious, rounding, BF16>, \
   apply_row<cautious, rounding, F16>}
#define LION_ENCODE(cautious, G) \
  {encode_row<cautious, G, float>, encode_row<cautious, G, BF16>, encode_row<cautious, G, F16>}
#define LION_ENCODES(cautious) \
  {LION_ENCODE(cautious, float), LION_ENCODE(cautious, BF16), LION_ENCODE(cautious, F16)}
#define LION_AGREE(G) {agree_row<G, float>, agree_row<G, BF16>, agree_row<G, F16>}

const RowKernels kRows = {
    LION_SIMD_NAME,
    {LION_ENCODES(false), LION_ENCODES(true)},
    {LION_AGREE(float), LION_AGREE(BF16), LION_AGREE(F16)},
    {LION_STEPS(true), LION_STEPS(false)},
    {{LION_APPLIES(false, kNearest), LION_APPLIES(false, kStochastic),
      LION_APPLIES(false, kCompensated)},
     {LION_APPLIES(true, kNearest), LION_APPLIES(true, kStochastic),
      LION_APPLIES(true, kCompensated)}},
    dequantize_row,
    quantize_row,
    count_row<Tally>,
    count_row<Elect>,
};
