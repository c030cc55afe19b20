// tally and elect on CUDA tensors: device checks, then a launch on the current stream. Nothing here
// waits for the device. Not tally.cpp: its object file would be that of tally.cu.
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "about.h"
#include "coin.h"
#include "cuda/tally.h"
#include "planes.h"
#include "register.h"
#include "stable/boxed.h"
#include "stable/errors.h"
#include "stable/library.h"

namespace lion {
namespace {

// The dispatcher comes here where any of the tensors is on CUDA.
void check_devices(const Tensor& ballots, const Tensor& other, const char* name) {
  LION_CHECK(ballots.device().is_cuda(), "ballots must be on CUDA as ", name, " is, got ",
             ballots.device());
  LION_CHECK(other.device() == ballots.device(), name, " must be on ", ballots.device(),
             " as ballots are, got ", other.device());
}

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// Launches on the current stream of the device. This library has a CUDA runtime of its own, with a
// current device of its own; contexts and streams are the driver's, and torch's.
void launch(cudaError_t (*launcher)(const CudaTally&, cudaStream_t), const CudaTally& task,
            int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cudaSetDevice(device));
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream), "the current CUDA stream");
  check_cuda(launcher(task, static_cast<cudaStream_t>(stream)));
}

void check_all_devices(const Tensor& ballots, const Tensor& out, const char* name,
                       const Tensor& step, const CountOptions& options) {
  check_devices(ballots, out, name);
  LION_CHECK(step.scalar_type() == dtypes::int64 && step.numel() == 1,
             "step must be one int64, got ", step.scalar_type(), " of shape ", step.sizes());
  check_devices(ballots, step, "step");
  if (options.blanks.has_value()) check_devices(ballots, *options.blanks, "blanks");
  if (options.out_blanks.has_value()) check_devices(ballots, *options.out_blanks, "out_blanks");
  if (options.weights.has_value()) check_devices(ballots, *options.weights, "weights");
}

CudaTally task_of(TallyRun run, const Tensor& out, int64_t seed, const Tensor& step) {
  run.coin_key = mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(kTieStream));
  return {run, out.size(1), step.const_data_ptr<int64_t>()};
}

void tally(const Tensor& ballots, const Tensor& tally, int64_t scale, int64_t first_word,
           int64_t seed, const Tensor& step, const OptionalTensor& blanks,
           const OptionalTensor& out_blanks, const OptionalTensor& weights) {
  const CountOptions options{first_word, blanks, out_blanks, weights};
  check_all_devices(ballots, tally, "tally", step, options);
  const TallyRun run = check_tally(ballots, tally, scale, options);
  launch(launch_tally, task_of(run, tally, seed, step), ballots.device().index);
}

void elect(const Tensor& ballots, const Tensor& verdict, int64_t scale, int64_t first_word,
           int64_t seed, const Tensor& step, const OptionalTensor& blanks,
           const OptionalTensor& out_blanks, const OptionalTensor& weights) {
  const CountOptions options{first_word, blanks, out_blanks, weights};
  check_all_devices(ballots, verdict, "verdict", step, options);
  const TallyRun run = check_elect(ballots, verdict, scale, options);
  launch(launch_elect, task_of(run, verdict, seed, step), ballots.device().index);
}

}  // namespace

void register_cuda_ops(const char* name_space) {
  implement(name_space, "CUDA", {{"tally", boxed<tally>}, {"elect", boxed<elect>}});
}

}  // namespace lion

// For ctypes, as is what follows.
extern "C" __attribute__((visibility("default"))) const char* lion_kernels_take_refusal() {
  static thread_local std::string refusal;
  refusal = lion::take_refusal();
  return refusal.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* lion_kernels_schemas_digest() {
  return lion::about::schemas_digest;
}

// What went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* lion_kernels_register(
    const char* name_space) {
  static std::string error;
  try {
    lion::register_cuda_ops(name_space);
    return nullptr;
  } catch (const std::exception& raised) {
    error = raised.what();
    return error.c_str();
  }
}
