// Every operation of the SIMD level of target.h, in the table that interface.h describes.
#pragma once

#include "simd/apply.h"
#include "simd/encode.h"
#include "simd/int8.h"
#include "simd/interface.h"
#include "simd/step.h"
#include "simd/tally.h"
#include "simd/target.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

constexpr SimdLevel kLevel{
    LION_SIMD_NAME, kEncodes,     kAgrees,          kSteps,           kApplies,
    dequantize_run, quantize_run, count_run<Tally>, count_run<Elect>,
};

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
