// An op as torch's stable ABI calls it: arguments on a stack of 64-bit values, of which the op
// becomes the owner. Ops return nothing.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "stable/errors.h"
#include "stable/tensor.h"

namespace lion {

using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using MaybeTensors = std::vector<OptionalTensor>;
using OptionalTensors = std::optional<Tensors>;

// Argument<T>::take makes a T of a value and frees what the value points to.
template <class T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>);
  static T take(StableIValue value) {
    T out;
    std::memcpy(&out, &value, sizeof out);  // little endian
    return out;
  }
};

template <class T>
T* pointer_of(StableIValue value) {
  return Argument<T*>::take(value);
}

template <class T>
struct Argument<T*> {
  static T* take(StableIValue value) { return reinterpret_cast<T*>(value); }
};

template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(pointer_of<AtenTensorOpaque>(value)); }
};

template <>
struct Argument<std::string> {
  static std::string take(StableIValue value) {
    auto* string = pointer_of<StringOpaque>(value);
    size_t length = 0;
    const char* data = nullptr;
    check(torch_string_length(string, &length), "length", " of a string");
    check(torch_string_c_str(string, &data), "text", " of a string");
    std::string out(data, length);
    check(torch_delete_string(string), "to free a string");
    return out;
  }
};

// None is 0; anything else a pointer to a cell of its own, which torch made by new.
template <class T>
struct Argument<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> cell(pointer_of<StableIValue>(value));
    if (cell == nullptr) return std::nullopt;
    return Argument<T>::take(*cell);
  }
};

template <class T>
struct Argument<std::vector<T>> {
  static std::vector<T> take(StableIValue value) {
    auto* list = pointer_of<StableListOpaque>(value);
    size_t n = 0;
    check(torch_list_size(list, &n), "size", " of a list");
    std::vector<T> out;
    out.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      StableIValue item = 0;
      check(torch_list_get_item(list, i, &item), "an item", " of a list");
      out.push_back(Argument<T>::take(item));
    }
    check(torch_delete_list(list), "to free a list");
    return out;
  }
};

// Gives its value up under Python's lock. Torch takes that lock for every tensor that nothing else
// in C++ holds any longer, which costs a list of 148 x 3 tensors 35 us, and waits as often where
// other threads run Python; within the lock it is free.
template <class T>
struct UnderGil {
  std::optional<T> value;
  explicit UnderGil(T&& taken) : value(std::move(taken)) {}
  ~UnderGil() {
    if (!Py_IsInitialized()) return;
    const PyGILState_STATE state = PyGILState_Ensure();
    value.reset();
    PyGILState_Release(state);
  }
};

template <auto op>
struct Boxed;

template <class... Args, void (*op)(Args...)>
struct Boxed<op> {
  static void run(StableIValue* stack, uint64_t n_args, uint64_t) {
    // Before one is taken: of another op's, none is what its type says.
    if (n_args != sizeof...(Args))
      throw std::runtime_error("lion_kernels was built for an op of " +
                               std::to_string(sizeof...(Args)) + " arguments, got " +
                               std::to_string(n_args) + ": build it again");
    run(stack, std::index_sequence_for<Args...>{});
  }

 private:
  template <size_t... kPlaces>
  static void run(StableIValue* stack, std::index_sequence<kPlaces...>) {
    // All are owned before the op may raise.
    const UnderGil<std::tuple<std::decay_t<Args>...>> args{
        {Argument<std::decay_t<Args>>::take(stack[kPlaces])...}};
    std::apply(op, *args.value);
  }
};

// What torch calls for op.
template <auto op>
inline constexpr void (*boxed)(StableIValue*, uint64_t, uint64_t) = &Boxed<op>::run;

}  // namespace lion
