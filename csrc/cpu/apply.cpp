// apply over lists of CPU tensors: one parallel region a call.
#include <cstdint>
#include <string>
#include <vector>

#include "bitplanes.h"
#include "cpu/checks.h"
#include "cpu/lists.h"
#include "cpu/ops.h"
#include "cpu/scalars.h"
#include "planes.h"
#include "simd/levels.h"
#include "stable/errors.h"

namespace lion {
namespace {

// The presence flags that any rank set.
std::vector<uint32_t> flags_of_any(const Tensor& trailers) {
  std::vector<uint32_t> any(static_cast<size_t>(trailers.size(1) - kSealWords), 0u);
  const int32_t* flags = trailers.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < trailers.size(0); ++r, flags += trailers.stride(0))
    for (size_t w = 0; w < any.size(); ++w) any[w] |= static_cast<uint32_t>(flags[w]);
  return any;
}

// Whether every rank is ready, and all have one digest.
bool is_agreed(const Tensor& trailers) {
  const int32_t* first = trailers.const_data_ptr<int32_t>() + trailers.size(1) - kSealWords;
  for (int64_t r = 0; r < trailers.size(0); ++r) {
    const int32_t* seal = first + r * trailers.stride(0);
    if (seal[0] != 0 || seal[2] != first[2] || seal[3] != first[3]) return false;
  }
  return true;
}

}  // namespace

void cpu::apply(const MaybeTensors& params, const Tensor& verdict, const OptionalTensor& blanks,
                const Tensor& trailers, int64_t scale, const Tensor& lr, double weight_decay,
                const Tensor& step, const OptionalTensor& found_inf,
                const std::string& rounding_name, const OptionalTensors& lows, int64_t seed,
                bool cautious_decay, int64_t first_word, int64_t first_flag) {
  const int64_t count = count_of(step, "step");
  const Rounding rounding = check_rounding(rounding_name, lows, params.size(), count);
  check_planes(verdict, "verdict", 3);
  check_planes(trailers, "trailers", 2);
  LION_CHECK(verdict.size(1) >= 1 && verdict.size(1) <= kMaxPlanes, "verdict must have 1 to ",
             kMaxPlanes, " planes, got ", verdict.size(1));
  LION_CHECK(scale >= 1, "scale must be at least 1, got ", scale);
  if (blanks.has_value()) check_blanks(*blanks, "blanks", verdict.size(0), verdict.size(2));
  check_flags(trailers, first_flag, params.size());
  const std::vector<uint32_t> present = flags_of_any(trailers);
  Lists lists(params.size(), nullptr, rounding, &lows, first_word);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = present_in(params, "params", i);
    Item& item = lists.append({&p, nullptr, nullptr}, p);
    const size_t flag = static_cast<size_t>(first_flag) + i;
    if (((present[flag / kBitsPerWord] >> (flag % kBitsPerWord)) & 1u) == 0) item.data = nullptr;
  }
  check_room(first_word, lists.end_word(), verdict, "verdict");

  const double lr_value = scalar_value(lr, "lr");
  const uint64_t key = rounding_key(rounding, seed, count);
  if (is_set(found_inf) || !is_agreed(trailers)) return;
  const auto* words = reinterpret_cast<const uint32_t*>(verdict.const_data_ptr<int32_t>());
  const uint8_t* blank = nullptr;
  int64_t blank_stride = 0;
  if (blanks.has_value()) {
    blank = reinterpret_cast<const uint8_t*>(blanks->const_data_ptr<int32_t>());
    blank_stride = blanks->stride(0) * static_cast<int64_t>(sizeof(int32_t));
  }
  VerdictRun shape{nullptr,
                   verdict.stride(1),
                   nullptr,
                   static_cast<int>(verdict.size(1)),
                   static_cast<float>(scale),
                   static_cast<float>(lr_value * (1.0 / static_cast<double>(scale))),
                   static_cast<float>(1.0 - lr_value * weight_decay)};
  const auto& applies = simd_level().apply[cautious_decay][rounding];
  lists.for_each_run([&](size_t t, const Segment& whole) {
    const Item& item = lists[t];
    if (item.data == nullptr) return;
    const auto go = [&](int64_t shard, int64_t word, int64_t place, const Segment& s) {
      VerdictRun run = shape;
      run.plane0 = words + shard * verdict.stride(0) + word;
      if (blank != nullptr) run.blanks = blank + shard * blank_stride + word / kOctet;
      applies[item.dtype](advance(item.data, s.offset * item.data_size),
                          advance(item.low, s.offset * item.data_size), s.count, run,
                          RoundingRun{key, static_cast<uint64_t>(place - first_word)});
    };
    lists.for_each_piece(verdict.size(2), t, whole, go);
  });
  count_up(step, 1);
}

}  // namespace lion
