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
std::vector<uint32_t> flags_of_any(const Tensor& presence) {
  std::vector<uint32_t> any(static_cast<size_t>(presence.size(1)), 0u);
  const int32_t* flags = presence.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < presence.size(0); ++r, flags += presence.stride(0))
    for (size_t w = 0; w < any.size(); ++w) any[w] |= static_cast<uint32_t>(flags[w]);
  return any;
}

}  // namespace

void cpu::apply(const MaybeTensors& params, const Tensor& verdict, const Tensor& presence,
                int64_t scale, const Tensor& lr, double weight_decay, const Tensor& step,
                const OptionalTensor& found_inf, const std::string& rounding_name,
                const OptionalTensors& lows, int64_t seed, bool cautious_decay) {
  const int64_t count = count_of(step, "step");
  const Rounding rounding = check_rounding(rounding_name, lows, params.size(), count);
  check_planes(verdict, "verdict", 3);
  check_planes(presence, "presence", 2);
  LION_CHECK(verdict.size(1) >= 1 && verdict.size(1) <= kMaxPlanes, "verdict must have 1 to ",
             kMaxPlanes, " planes, got ", verdict.size(1));
  LION_CHECK(scale >= 1, "scale must be at least 1, got ", scale);
  check_flags(presence, "presence", params.size());
  const std::vector<uint32_t> present = flags_of_any(presence);
  Lists lists(params.size(), nullptr, rounding, &lows);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = present_in(params, "params", i);
    Item& item = lists.append({&p, nullptr, nullptr}, p);
    if (((present[i / kBitsPerWord] >> (i % kBitsPerWord)) & 1u) == 0) item.data = nullptr;
  }
  check_room(lists.n_words(), verdict, "verdict");

  const double lr_value = scalar_value(lr, "lr");
  const uint64_t key = rounding_key(rounding, seed, count);
  if (is_set(found_inf)) return;
  const auto* words = reinterpret_cast<const uint32_t*>(verdict.const_data_ptr<int32_t>());
  VerdictRun shape{nullptr,
                   verdict.stride(1),
                   static_cast<int>(verdict.size(1)),
                   static_cast<float>(scale),
                   static_cast<float>(lr_value * (1.0 / static_cast<double>(scale))),
                   static_cast<float>(1.0 - lr_value * weight_decay)};
  const auto& applies = simd_level().apply[cautious_decay][rounding];
  lists.for_each_run([&](size_t t, const Segment& whole) {
    const Item& item = lists[t];
    if (item.data == nullptr) return;
    lists.for_each_piece(verdict.size(2), t, whole,
                         [&](int64_t shard, int64_t word, int64_t first_word, const Segment& s) {
                           VerdictRun run = shape;
                           run.plane0 = words + shard * verdict.stride(0) + word;
                           applies[item.dtype](advance(item.data, s.offset * item.data_size),
                                               advance(item.low, s.offset * item.data_size),
                                               s.count, run,
                                               RoundingRun{key, static_cast<uint64_t>(first_word)});
                         });
  });
  count_up(step, 1);
}

}  // namespace lion
