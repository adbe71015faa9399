# SPDX-License-Identifier: Apache-2.0
"""The kernels of stateless.py for CUDA: ids in registers, never in memory.

    moved[k] = W[k] + values[g(start + k)]        values = theta scale [d]
    sums[g(start + k)] += grad_w[k]               atomically

stateless.py compares them with gpart.py on a GPU before it times them, and the tests on
a CPU, where Triton's interpreter runs them. One partition's N, d and keys are constants
to the compiler, which turns remainders by a constant into products. N up to 2^62: i and
x have 64 bits, the halves of i and the hash 32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import gpart

BLOCK = 1024


@triton.jit
def round_function(key, x):  # type: ignore[no-untyped-def]
    # uint32 wraps: the low 31 bits of a product are those of the whole one
    x = x ^ key
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0x7FFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x46CA68B5) & 0x7FFFFFFF
    return x ^ (x >> 16)


@triton.jit
def feistel(i, P: tl.constexpr):  # type: ignore[no-untyped-def]
    A: tl.constexpr = P[2]
    B: tl.constexpr = P[3]
    KEYS: tl.constexpr = P[4]
    left = (i // B).to(tl.uint32)
    right = (i % B).to(tl.uint32)
    for t in tl.static_range(len(KEYS)):
        if t % 2 == 0:
            left = (left + round_function(KEYS[t], right)) % A
        else:
            right = (right + round_function(KEYS[t], left)) % B
    return left.to(tl.int64) * B + right.to(tl.int64)


@triton.jit
def groups(i, P: tl.constexpr):  # type: ignore[no-untyped-def]
    N: tl.constexpr = P[0]
    D: tl.constexpr = P[1]
    x = feistel(i, P)
    while tl.max((x >= N).to(tl.int32), 0) > 0:  # cycle walking
        x = tl.where(x >= N, feistel(x, P), x)
    return x % D


@triton.jit
def block(start, n, P: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # what is beyond n repeats the last weight: a walk from beyond N might never end
    return k, k < n, groups(start + tl.minimum(k, n - 1), P)


@triton.jit
def add_kernel(w, values, out, start, n, P: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    k, inside, ids = block(start, n, P, BLOCK)
    value = tl.load(values + ids, mask=inside)
    value += tl.load(w + k, mask=inside).to(value.dtype)
    tl.store(out + k, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(grad, sums, start, n, P: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    k, inside, ids = block(start, n, P, BLOCK)
    value = tl.load(grad + k, mask=inside).to(sums.dtype.element_ty)
    tl.atomic_add(sums + ids, value, mask=inside, sem="relaxed")


def constants(ids: Any) -> tuple[Any, ...]:
    return ids.partition.N, ids.partition.d, ids.a, ids.b, tuple(ids.keys)


def launch(kernel: Any, ids: Any, *tensors: Tensor) -> None:
    gpart.require(not torch.is_grad_enabled(), "on CUDA there is no second derivative")
    grid = (triton.cdiv(ids.n, BLOCK),)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, ids.start, ids.n, constants(ids), BLOCK)


def add_update(w: Tensor, values: Tensor, ids: Any) -> Tensor:
    """W + P theta: added in values' dtype, cast to W's once."""
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    launch(add_kernel, ids, w.contiguous(), values, out)
    return out


def sums(grad_w: Tensor, ids: Any, like: Tensor) -> Tensor:
    """The sum of each group's entries, in like's dtype: [d]."""
    out = torch.zeros_like(like)
    launch(sum_kernel, ids, grad_w.contiguous(), out)
    return out
