// The module lion_kernels._C: importing it loads the ops; it tells how the library was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>

#include "bitplanes.h"
#include "simd/levels.h"

#ifndef LION_KERNELS_VERSION
#error "setup.py defines LION_KERNELS_VERSION"
#endif
#ifndef LION_KERNELS_CUDA_ARCHS
#define LION_KERNELS_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = LION_KERNELS_VERSION;
        info["torch"] = TORCH_VERSION;
        info["cuda"] = std::string(LION_KERNELS_CUDA_ARCHS) != "";
        info["cuda_archs"] = LION_KERNELS_CUDA_ARCHS;
        info["simd"] = lion::simd_level().name;
        info["simd_levels"] = lion::simd_levels();
        info["bits_per_word"] = lion::kBitsPerWord;
        return info;
      },
      "How this library was built, and the SIMD level in use on this machine.");
  m.def("set_simd_level", &lion::set_simd_level, pybind11::arg("name"),
        "Use the kernels of `name` (one of build_info()['simd_levels']); for tests.");
}
