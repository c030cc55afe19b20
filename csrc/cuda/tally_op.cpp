// tally and elect on CUDA tensors: device checks, then a launch on the current stream. Nothing here
// waits for the device. Not tally.cpp: its object file would be that of tally.cu.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "coin.h"
#include "cuda/tally.h"
#include "planes.h"

namespace lion {
namespace {

// The dispatcher comes here where any of the tensors is on CUDA.
void check_devices(const at::Tensor& ballots, const at::Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(ballots.is_cuda(), "ballots must be on CUDA as ", name, " is, got ",
                    ballots.device());
  TORCH_CHECK_VALUE(other.device() == ballots.device(), name, " must be on ", ballots.device(),
                    " as ballots are, got ", other.device());
}

void tally(const at::Tensor& ballots, const at::Tensor& tally, int64_t scale) {
  check_devices(ballots, tally, "tally");
  const CudaTally task{check_tally(ballots, tally, scale), tally.size(1), nullptr};
  const c10::cuda::CUDAGuard guard(ballots.device());
  C10_CUDA_CHECK(launch_tally(task, c10::cuda::getCurrentCUDAStream()));
}

void elect(const at::Tensor& ballots, const at::Tensor& verdict, int64_t scale, int64_t first_word,
           int64_t seed, const at::Tensor& step) {
  check_devices(ballots, verdict, "verdict");
  TORCH_CHECK_VALUE(step.scalar_type() == at::kLong && step.numel() == 1,
                    "step must be one int64, got ", step.scalar_type(), " of shape ", step.sizes());
  check_devices(ballots, step, "step");
  CudaTally task{check_elect(ballots, verdict, scale, first_word), verdict.size(1),
                 step.const_data_ptr<int64_t>()};
  task.run.coin_key = mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(kTieStream));
  const c10::cuda::CUDAGuard guard(ballots.device());
  C10_CUDA_CHECK(launch_elect(task, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(lion_kernels, CUDA, m) {
  m.impl("tally", tally);
  m.impl("elect", elect);
}

}  // namespace lion
