// What tally and elect accept; see the schemas in lion_kernels/ops.py.
#include "planes.h"

#include "bitplanes.h"
#include "stable/errors.h"

namespace lion {
namespace {

int bit_length(int64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(static_cast<uint64_t>(x)); }

TallyRun check_run(const Tensor& ballots, const Tensor& out, const char* name, int64_t scale,
                   bool says_zero, const CountOptions& options) {
  check_planes(ballots, "ballots", 3);
  check_planes(out, name, 2);
  LION_CHECK(ballots.size(2) == out.size(1), name, " must have ", ballots.size(2),
             " words a plane, got ", out.size(1));
  LION_CHECK(ballots.size(0) >= 1 && ballots.size(1) >= 1,
             "ballots must hold at least one plane, got shape ", ballots.sizes());
  LION_CHECK(scale >= 1 && bit_length(scale) <= kMaxPlanes, "scale must be in [1, ",
             (1 << kMaxPlanes) - 1, "], got ", scale);
  LION_CHECK(ballots.size(1) <= bit_length(scale), "ballots of ", ballots.size(1),
             " planes can exceed scale ", scale);
  TallyRun run{};
  run.ballots = reinterpret_cast<const uint32_t*>(ballots.const_data_ptr<int32_t>());
  run.ballot_stride = ballots.stride(0);
  run.plane_stride = ballots.stride(1);
  run.n_ballots = ballots.size(0);
  run.planes_in = static_cast<int>(ballots.size(1));
  run.planes_out = bit_length(scale);
  run.scale = static_cast<uint32_t>(scale);
  run.out = reinterpret_cast<uint32_t*>(out.data_ptr<int32_t>());
  run.out_stride = out.stride(0);
  run.first_word = static_cast<uint64_t>(options.first_word);
  const auto& [first_word, blanks, out_blanks, weights] = options;
  if (blanks.has_value()) {
    check_blanks(*blanks, "blanks", ballots.size(0), ballots.size(2));
    LION_CHECK(ballots.size(1) == 1, "blanks are of ballots of 1 plane, got ", ballots.size(1));
    run.blanks = reinterpret_cast<const uint8_t*>(blanks->const_data_ptr<int32_t>());
    run.blank_stride = blanks->stride(0) * static_cast<int64_t>(sizeof(int32_t));
  }
  const bool needs_blanks = blanks.has_value() && !says_zero;
  LION_CHECK(out_blanks.has_value() == needs_blanks, "out_blanks must be ",
             needs_blanks ? "there: an odd scale cannot say zero" : "None");
  if (needs_blanks) {
    check_blanks(*out_blanks, "out_blanks", 1, out.size(1));
    run.out_blanks = reinterpret_cast<uint8_t*>(out_blanks->data_ptr<int32_t>());
    run.out_blank_bytes = out_blanks->size(1) * static_cast<int64_t>(sizeof(int32_t));
  }
  if (weights.has_value()) {
    LION_CHECK(weights->scalar_type() == dtypes::int32 && weights->dim() == 1 &&
                   weights->numel() == ballots.size(0) && weights->is_contiguous(),
               "weights must be contiguous int32 of shape [", ballots.size(0), "], got ",
               weights->scalar_type(), " of shape ", weights->sizes());
    run.weights = weights->const_data_ptr<int32_t>();
  }
  return run;
}

}  // namespace

void check_blanks(const Tensor& blanks, const char* name, int64_t n, int64_t n_words) {
  check_planes(blanks, name, 2);
  const int64_t words = (n_words + kBitsPerWord - 1) / kBitsPerWord;
  LION_CHECK(blanks.size(0) == n && blanks.size(1) >= words, name, " must have shape [", n, ", ",
             words, " or more], got ", blanks.sizes());
}

void check_planes(const Tensor& planes, const char* name, int64_t dims) {
  LION_CHECK(planes.scalar_type() == dtypes::int32, name, " must be int32, got ",
             planes.scalar_type());
  LION_CHECK(planes.dim() == dims, name, " must have ", dims, " dimensions, got shape ",
             planes.sizes());
  LION_CHECK(planes.size(dims - 1) <= 1 || planes.stride(dims - 1) == 1, name,
             " must have unit stride in its last dimension, got strides ", planes.strides());
}

TallyRun check_tally(const Tensor& ballots, const Tensor& tally, int64_t scale,
                     const CountOptions& options) {
  const TallyRun run = check_run(ballots, tally, "tally", scale, scale % 2 == 0, options);
  LION_CHECK(tally.size(0) == run.planes_out, "tally must have ", run.planes_out,
             " planes for scale ", scale, ", got ", tally.size(0));
  return run;
}

TallyRun check_elect(const Tensor& ballots, const Tensor& verdict, int64_t scale,
                     const CountOptions& options) {
  check_planes(verdict, "verdict", 2);
  TallyRun run = check_run(ballots, verdict, "verdict", scale, verdict.size(0) == 2, options);
  LION_CHECK(verdict.size(0) == 1 || (verdict.size(0) == 2 && scale % 2 == 0),
             "verdict must have 1 plane, or 2 where scale is even; got ", verdict.size(0),
             " for scale ", scale);
  run.toss_ties = verdict.size(0) == 1;
  return run;
}

}  // namespace lion
