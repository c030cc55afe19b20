"""The rooms on the GPU: Triton kernels that register into the op table of _ops.py for CUDA tensors.

The CPU's rooms are C++ (csrc/). There are no GPU kernels in this version: parameters that are not
on the CPU are refused at construction.
"""
