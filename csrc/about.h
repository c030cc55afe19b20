// What a library was built from. The file that defines it, about.cpp, is written by setup.py and by
// tools/hub.py.
#pragma once

namespace lion::about {

extern const char* const version;
// As TORCH_CUDA_ARCH_LIST has them; empty without CUDA, and in the hub's builds.
extern const char* const cuda_archs;
// Of the ops that it implements: lion_kernels/_about.py.
extern const char* const schemas_digest;

}  // namespace lion::about
