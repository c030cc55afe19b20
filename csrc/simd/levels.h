// Which SIMD level the CPU ops use: the best one of this machine, or what LION_KERNELS_SIMD names.
#pragma once

#include <string>
#include <vector>

#include "simd/interface.h"

namespace lion {

const SimdLevel& simd_level();
// The names of this machine's levels, the best one last.
std::vector<std::string> simd_levels();
// Raises ValueError where this machine has no such level.
void set_simd_level(const std::string& name);

}  // namespace lion
