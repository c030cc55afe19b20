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
#include "tally_rows.h"

#define LION_MOMENTA(skip, rounding, P)                                   \
  {step_row<skip, rounding, P, float>, step_row<skip, rounding, P, BF16>, \
   step_row<skip, rounding, P, F16>}
#define LION_TYPES(skip, rounding)                                          \
  {LION_MOMENTA(skip, kNearest, float), LION_MOMENTA(skip, rounding, BF16), \
   LION_MOMENTA(skip, rounding, F16)}
#define LION_STEPS(skip) \
  {LION_TYPES(skip, kNearest), LION_TYPES(skip, kStochastic), LION_TYPES(skip, kCompensated)}

const RowKernels kRows = {
    LION_SIMD_NAME,
    {{encode_row<float, float>, encode_row<float, BF16>, encode_row<float, F16>},
     {encode_row<BF16, float>, encode_row<BF16, BF16>, encode_row<BF16, F16>},
     {encode_row<F16, float>, encode_row<F16, BF16>, encode_row<F16, F16>}},
    {LION_STEPS(false), LION_STEPS(true)},
    {{apply_row<kNearest, float>, apply_row<kNearest, BF16>, apply_row<kNearest, F16>},
     {apply_row<kNearest, float>, apply_row<kStochastic, BF16>, apply_row<kStochastic, F16>},
     {apply_row<kNearest, float>, apply_row<kCompensated, BF16>, apply_row<kCompensated, F16>}},
    count_row<Tally>,
    count_row<Elect>,
};
