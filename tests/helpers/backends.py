"""What the op tests run on: the specification, each SIMD level, and the GPU's kernels.

The GPU's kernels run on a GPU where there is one. Where there is none, the Triton kernels run in
Triton's interpreter and the CUDA source under a shim on the host, on CPU tensors.
"""

# ruff: noqa: E402  (Triton reads the environment when it is imported)
import functools
import os
import tempfile

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import numpy as np
from triton.runtime import interpreter

import on_host
from lion_kernels import _C, build_info, ops, reference
from lion_kernels.kernels import launch

SIMD_LEVELS = build_info()["simd_levels"]
GPU = "cuda" if HAS_CUDA else "GPU kernels on the host"
BACKENDS = ["reference", *SIMD_LEVELS, GPU]


def _fma(self, x, y, z):
    """One rounding, as on a GPU; the interpreter of triton 3.6 makes two."""
    if z.data.dtype != np.float32:
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    a, b, c = np.broadcast_arrays(*(t.data.astype(np.float64) for t in (x, y, z)))
    product = a * b  # exact
    total = np.array(product + c)
    rounded_c = total - product
    error = (product - (total - rounded_c)) + (c - rounded_c)
    # Rounded to odd, the float64 sum keeps on which side of a float32 tie it lies.
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_impl(self, src, dst_type):
    """bfloat16 and float32 as on a GPU: the interpreter truncates where a GPU rounds to nearest
    even, and breaks subnormals."""
    types = src.dtype.scalar, dst_type.scalar
    if types == (interpreter.tl.float32, interpreter.tl.bfloat16):
        rounded = torch.from_numpy(np.asarray(src.data, np.float32)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), types[1])
    if types == (interpreter.tl.bfloat16, interpreter.tl.float32):
        widened = np.asarray(src.data, np.uint16).astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(widened.view(np.float32), types[1])
    return _cast(self, src, dst_type)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """A tensor of one element is an index. The interpreter of triton 3.6 calls int on its array,
    which numpy 2.5 refuses unless it has no dimension."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _map_elementwise(function, *tensors):
    """The interpreter has none. A test of an element within holds there for all: what the kernels
    map gives the same where the test would have failed."""
    return function(*tensors)


def _maxnum(self, x, y):
    """The number beside a NaN, as on a GPU; the interpreter of triton 3.6 gives the NaN."""
    return self.binary_op(x, y, np.fmax)


if not HAS_CUDA:
    np.seterr(over="ignore", invalid="ignore")  # what a GPU does without a word
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
    interpreter.InterpreterBuilder.create_maxnumf = _maxnum
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.tl.map_elementwise = _map_elementwise


class OnHost:
    """The GPU's kernels on CPU tensors."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()

    @functools.cached_property
    def _tally(self):
        return on_host.OnHost(self._folder.name)

    def __getattr__(self, name):
        return getattr(self._tally if name in ("tally", "elect") else launch, name)


class OnCuda:
    """The ops on the GPU, for CPU tensors: whole storages travel there and back, so that strides,
    alignment and bytes beside the tensors are what the test made them."""

    def __getattr__(self, name):
        def call(*args, **kwargs):
            storages, views = {}, {}

            def moved(x):
                if isinstance(x, (list, tuple)):
                    return [moved(item) for item in x]
                if not isinstance(x, torch.Tensor):
                    return x
                if name != "encode" and x.dtype == torch.float64:
                    return x  # an lr on the host
                storage = x.untyped_storage()
                there = storages.setdefault(
                    storage.data_ptr(), (storage, storage.cuda() if storage.nbytes() else None)
                )[1]
                if there is None:
                    return torch.empty_like(x, device="cuda")
                view = torch.empty(0, dtype=x.dtype, device="cuda")
                view.set_(there, x.storage_offset(), x.size(), x.stride())
                views[id(view)] = view
                return view

            getattr(torch.ops.lion_kernels, name)(
                *moved(args), **{key: moved(value) for key, value in kwargs.items()}
            )
            for here, there in storages.values():
                if there is not None:
                    here.copy_(there)

        return call


@functools.cache
def gpu():
    """The GPU's kernels: on the GPU, or on the host where there is none."""
    return OnCuda() if HAS_CUDA else OnHost()


def select(name):
    """The backend of that name, and what undoes the selection."""
    if name == "reference":
        return reference, lambda: None
    if name == GPU:
        return gpu(), lambda: None
    before = build_info()["simd"]
    _C.set_simd_level(name)
    return ops, lambda: _C.set_simd_level(before)
