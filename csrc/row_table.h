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

const RowKernels kRows = {
    LION_SIMD_NAME,
    {{encode_row<float, float>, encode_row<float, BF16>, encode_row<float, F16>},
     {encode_row<BF16, float>, encode_row<BF16, BF16>, encode_row<BF16, F16>},
     {encode_row<F16, float>, encode_row<F16, BF16>, encode_row<F16, F16>}},
    {{{step_row<false, float, float>, step_row<false, float, BF16>, step_row<false, float, F16>},
      {step_row<false, BF16, float>, step_row<false, BF16, BF16>, step_row<false, BF16, F16>},
      {step_row<false, F16, float>, step_row<false, F16, BF16>, step_row<false, F16, F16>}},
     {{step_row<true, float, float>, step_row<true, float, BF16>, step_row<true, float, F16>},
      {step_row<true, BF16, float>, step_row<true, BF16, BF16>, step_row<true, BF16, F16>},
      {step_row<true, F16, float>, step_row<true, F16, BF16>, step_row<true, F16, F16>}}},
    {apply_row<float>, apply_row<BF16>, apply_row<F16>},
    count_row<Tally>,
    count_row<Elect>,
};
