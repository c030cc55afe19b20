// Every header that the row kernels need, included before the compiler's target is raised, so that
// no inline function of the standard library is compiled for a machine that may not be there.
#pragma once

#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bitplanes.h"
#include "coin.h"
#include "rows.h"
