// The launchers of tally and elect on CUDA: plain pointers in, no tensors.
#pragma once

#include <cstdint>

#include "tally_run.h"

// A host shim declares these types itself, to run the kernels without a GPU.
#ifndef LION_CUDA_SHIM
#include <cuda_runtime.h>
#endif

namespace lion {

struct CudaTally {
  // run.coin_key is the key without the step, mix64(mix64(seed) ^ stream): the step counter lives
  // on the device, and reading it on the host would wait for the device.
  TallyRun run;
  int64_t n_words;
  const int64_t* step;  // device memory; read only where coins are tossed
};

// They return what the launches returned; without words nothing is launched.
cudaError_t launch_tally(const CudaTally& task, cudaStream_t stream);
cudaError_t launch_elect(const CudaTally& task, cudaStream_t stream);

}  // namespace lion
