// The twin of csrc/bindings.cpp for the Hugging Face hub: the same functions in Python's limited
// API, as one module with the CUDA part, under the name that the hub's builder gives it. Not part
// of the build of setup.py; tools/hub.py puts it beside about.cpp, which it writes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "about.h"
#include "bitplanes.h"
#include "identity.h"
#include "register.h"
#include "simd/levels.h"
#include "stable/errors.h"

namespace {

// What C++ raises, as Python sees it from pybind11's module.
template <class Call>
PyObject* calling(const Call& call) {
  try {
    return call();
  } catch (const lion::PythonError&) {
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Null where it could not be made: then Py_BuildValue passes the error on.
PyObject* list_of(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    if (item == nullptr || PyList_Append(list, item) != 0) {
      Py_XDECREF(item);
      Py_CLEAR(list);
      break;
    }
    Py_DECREF(item);
  }
  return list;
}

PyObject* build_info(PyObject*, PyObject*) {
  return calling([] {
    return Py_BuildValue("{s:s,s:s,s:s,s:N,s:i}", "version", lion::about::version, "cuda_archs",
                         lion::about::cuda_archs, "simd", lion::simd_level().name, "simd_levels",
                         list_of(lion::simd_levels()), "bits_per_word",
                         static_cast<int>(lion::kBitsPerWord));
  });
}

// Whether those of CUDA tensors are among them.
PyObject* register_ops(PyObject*, PyObject* args) {
  const char* name_space = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name_space)) return nullptr;
  return calling([&] {
    lion::register_cpu_ops(name_space);
#ifdef CUDA_KERNEL
    lion::register_cuda_ops(name_space);
    return PyBool_FromLong(1);
#else
    return PyBool_FromLong(0);
#endif
  });
}

PyObject* take_refusal(PyObject*, PyObject*) {
  return calling([] { return PyUnicode_FromString(lion::take_refusal().c_str()); });
}

PyObject* set_simd_level(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return calling([&] {
    lion::set_simd_level(name);
    Py_INCREF(Py_None);
    return Py_None;
  });
}

Py_ssize_t bytes_in(const std::vector<int64_t>& numbers) {
  return static_cast<Py_ssize_t>(numbers.size() * sizeof(int64_t));
}

PyObject* identity(PyObject*, PyObject* args) {
  PyObject *fixed = nullptr, *grads = nullptr;
  if (!PyArg_ParseTuple(args, "OO", &fixed, &grads)) return nullptr;
  return calling([&] {
    const lion::Identity found = lion::identity(fixed, grads);
    const auto* addresses = reinterpret_cast<const char*>(found.addresses.data());
    const auto* numbers = reinterpret_cast<const char*>(found.numbers.data());
    return Py_BuildValue("NN", PyBytes_FromStringAndSize(addresses, bytes_in(found.addresses)),
                         PyBytes_FromStringAndSize(numbers, bytes_in(found.numbers)));
  });
}

PyObject* odd_gradients(PyObject*, PyObject* args) {
  const char* known = nullptr;
  Py_ssize_t size = 0;
  PyObject *tensors = nullptr, *grads = nullptr;
  if (!PyArg_ParseTuple(args, "y#OO", &known, &size, &tensors, &grads)) return nullptr;
  return calling([&]() -> PyObject* {
    const std::string_view bytes(known, static_cast<size_t>(size));
    const std::vector<int64_t> odd = lion::odd_gradients(bytes, tensors, grads);
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(odd.size()));
    for (size_t i = 0; list != nullptr && i < odd.size(); ++i) {
      PyObject* number = PyLong_FromLongLong(odd[i]);
      if (number == nullptr || PyList_SetItem(list, static_cast<Py_ssize_t>(i), number) != 0)
        Py_CLEAR(list);
    }
    return list;
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, nullptr},
    {"register_ops", register_ops, METH_VARARGS, nullptr},
    {"take_refusal", take_refusal, METH_NOARGS, nullptr},
    {"set_simd_level", set_simd_level, METH_VARARGS, nullptr},
    {"identity", identity, METH_VARARGS, nullptr},
    {"odd_gradients", odd_gradients, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

#define LION_TEXT(name) LION_TEXT_OF(name)
#define LION_TEXT_OF(name) #name
#define LION_INIT(name) LION_INIT_OF(name)
#define LION_INIT_OF(name) PyInit_##name

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      LION_TEXT(TORCH_EXTENSION_NAME),
                      nullptr,
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC LION_INIT(TORCH_EXTENSION_NAME)() {
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr &&
      PyModule_AddStringConstant(made, "schemas_digest", lion::about::schemas_digest) != 0)
    Py_CLEAR(made);
  return made;
}
