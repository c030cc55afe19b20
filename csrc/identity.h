// What tells two calls with the same tensors from two with others: one list of numbers a call, for
// the plans of the optimizers and the caches of the GPU launchers. In C++, because asking 148
// tensors from Python takes longer than the step of a small model.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace lion {

struct Identity {
  std::vector<int64_t> addresses;  // of the gradients, 0: none; they may be others in every step
  // Of every tensor of `fixed`, and of the gradients but for their addresses, of which only the
  // alignment counts.
  std::vector<int64_t> numbers;
};

// The arguments are lists or tuples of torch.Tensor, or None for one. Raises PythonError where
// torch raised: a tensor may have no data. Looking at a tensor that torch clones lazily
// (torch._lazy_clone) makes its copy, since DLPack gives the address of data that may be written.
Identity identity(PyObject* fixed, PyObject* grads);

// Which gradients are not in the memory layout of their parameters, which come first in `tensors`,
// before what is kept for them; {-1} where one of those is not what its numbers in `known` say, or
// a gradient does not fit its parameter. Negative and conjugate views count as what they view.
std::vector<int64_t> odd_gradients(std::string_view known, PyObject* tensors, PyObject* grads);

// A Python exception is set.
struct PythonError {};

}  // namespace lion
