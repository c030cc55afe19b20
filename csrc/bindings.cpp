// The module lion_kernels._C: it registers the ops of CPU tensors, and tells how the library was
// built and what tells tensors apart. csrc/hub/module.cpp is its twin.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "about.h"
#include "bitplanes.h"
#include "identity.h"
#include "register.h"
#include "simd/levels.h"
#include "stable/errors.h"

namespace py = pybind11;

namespace {

py::bytes bytes_of(const std::vector<int64_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

// How this library was built, and the SIMD level in use on this machine.
py::dict build_info() {
  py::list levels;
  for (const std::string& name : lion::simd_levels()) levels.append(name);
  py::dict info;
  info["version"] = lion::about::version;
  info["cuda_archs"] = lion::about::cuda_archs;
  info["simd"] = lion::simd_level().name;
  info["simd_levels"] = levels;
  info["bits_per_word"] = lion::kBitsPerWord;
  return info;
}

// Whether those of CUDA tensors are among them: here they have a library of their own.
bool register_ops(const char* name_space) {
  lion::register_cpu_ops(name_space);
  return false;
}

// Calls an op of identity.h; what Python raised there is raised.
template <class Call>
auto calling(const Call& call) {
  try {
    return call();
  } catch (const lion::PythonError&) {
    throw py::error_already_set();
  }
}

py::tuple identity(const py::object& fixed, const py::object& grads) {
  const lion::Identity found = calling([&] { return lion::identity(fixed.ptr(), grads.ptr()); });
  return py::make_tuple(bytes_of(found.addresses), bytes_of(found.numbers));
}

py::list odd_gradients(const py::bytes& known, const py::object& tensors, const py::object& grads) {
  py::list odd;
  for (const int64_t i : calling([&] {
         return lion::odd_gradients(std::string_view(known), tensors.ptr(), grads.ptr());
       }))
    odd.append(i);
  return odd;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("schemas_digest") = lion::about::schemas_digest;
  m.def("build_info", &build_info);
  m.def("take_refusal", &lion::take_refusal);
  m.def("register_ops", &register_ops, py::arg("name_space"));
  // Use the kernels of one of build_info()['simd_levels']; for tests.
  m.def("set_simd_level", &lion::set_simd_level, py::arg("name"));
  m.def("identity", &identity);
  m.def("odd_gradients", &odd_gradients);
}
