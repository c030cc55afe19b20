// csrc/cuda/tally.cu compiled for the host, with C entry points for on_host.py.
// clang-format off: the shim comes first.
#include "cuda_shim.h"
#include "cuda/tally.cu"
// clang-format on

extern "C" {

// A run, its coin key aside, is that of lion::TallyRun. Returns the cudaError_t of the launch.
int lion_count(const lion::TallyRun* run, int64_t n_words, int64_t seed, const int64_t* step,
               int is_elect) {
  lion::CudaTally task{*run, n_words, step};
  task.run.coin_key = lion::mix64(lion::mix64(static_cast<uint64_t>(seed)) ^
                                  static_cast<uint64_t>(lion::kTieStream));
  return is_elect != 0 ? lion::launch_elect(task, nullptr) : lion::launch_tally(task, nullptr);
}

int lion_launches() { return shim_launches; }
}
