// What tally and elect accept; see the schemas in lion_kernels/ops.py.
#include "planes.h"

#include "bitplanes.h"
#include "stable/errors.h"

namespace lion {
namespace {

int bit_length(int64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(static_cast<uint64_t>(x)); }

TallyRun check_run(const Tensor& ballots, const Tensor& out, const char* name, int64_t scale) {
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
  return run;
}

}  // namespace

void check_planes(const Tensor& planes, const char* name, int64_t dims) {
  LION_CHECK(planes.scalar_type() == dtypes::int32, name, " must be int32, got ",
             planes.scalar_type());
  LION_CHECK(planes.dim() == dims, name, " must have ", dims, " dimensions, got shape ",
             planes.sizes());
  LION_CHECK(planes.size(dims - 1) <= 1 || planes.stride(dims - 1) == 1, name,
             " must have unit stride in its last dimension, got strides ", planes.strides());
}

TallyRun check_tally(const Tensor& ballots, const Tensor& tally, int64_t scale) {
  const TallyRun run = check_run(ballots, tally, "tally", scale);
  LION_CHECK(tally.size(0) == run.planes_out, "tally must have ", run.planes_out,
             " planes for scale ", scale, ", got ", tally.size(0));
  return run;
}

TallyRun check_elect(const Tensor& ballots, const Tensor& verdict, int64_t scale,
                     int64_t first_word) {
  TallyRun run = check_run(ballots, verdict, "verdict", scale);
  LION_CHECK(verdict.size(0) == 1 || (verdict.size(0) == 2 && scale % 2 == 0),
             "verdict must have 1 plane, or 2 where scale is even; got ", verdict.size(0),
             " for scale ", scale);
  run.toss_ties = verdict.size(0) == 1;
  run.first_word = static_cast<uint64_t>(first_word);
  return run;
}

}  // namespace lion
