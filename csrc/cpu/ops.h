// The ops on CPU tensors; their schemas, and what they do, stand in lion_kernels/ops.py.
#pragma once

#include <cstdint>
#include <string>

#include "stable/boxed.h"

namespace lion::cpu {

void lion_step(const MaybeTensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Tensor& lr, double beta1, double beta2, double weight_decay, bool maximize,
               const OptionalTensor& nonfinite, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf, const std::string& rounding,
               const OptionalTensors& lows, int64_t seed, const OptionalTensor& step, bool cautious,
               bool cautious_decay, const OptionalTensors& block_scales,
               const OptionalTensor& agreeing, bool uniform);

void count_agreeing(const Tensors& grads, const Tensors& exp_avgs, const Tensor& agreeing,
                    double beta1, bool maximize, const OptionalTensor& grad_scale,
                    const OptionalTensors& block_scales);

void encode(const MaybeTensors& grads, const Tensors& exp_avgs, const Tensor& ballot,
            const OptionalTensor& blanks, double beta1, double beta2, bool maximize, int64_t seed,
            int64_t rank, const Tensor& step, const Tensor& nonfinite,
            const OptionalTensor& grad_scale, const OptionalTensor& found_inf, bool cautious,
            const OptionalTensors& block_scales, int64_t first_word, const OptionalTensor& trailers,
            const OptionalTensor& trailer, const OptionalTensor& shared);

void tally(const Tensor& ballots, const Tensor& tally, int64_t scale, int64_t first_word,
           int64_t seed, const Tensor& step, const OptionalTensor& blanks,
           const OptionalTensor& out_blanks, const OptionalTensor& weights);

void elect(const Tensor& ballots, const Tensor& verdict, int64_t scale, int64_t first_word,
           int64_t seed, const Tensor& step, const OptionalTensor& blanks,
           const OptionalTensor& out_blanks, const OptionalTensor& weights);

void apply(const MaybeTensors& params, const Tensor& verdict, const OptionalTensor& blanks,
           const Tensor& trailers, int64_t scale, const Tensor& lr, double weight_decay,
           const Tensor& step, const OptionalTensor& found_inf, const std::string& rounding,
           const OptionalTensors& lows, int64_t seed, bool cautious_decay, int64_t first_word,
           int64_t first_flag);

}  // namespace lion::cpu
