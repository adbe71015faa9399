# SPDX-License-Identifier: Apache-2.0
"""The checks of the exercises in geometry.ipynb: each prints Correct, or what is wrong.

A check is a law. Hypothesis looks for a case in which the answer breaks it, and shows
the smallest that it finds: small N and d, whole numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, Verbosity, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from gpart import Partition

Answer = Callable[..., Any]

SEARCH = settings(
    max_examples=50,
    derandomize=True,  # everybody meets the same cases
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],  # to explain takes ten times as long
    print_blob=False,
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,
)
few = st.integers(1, 4)


class Wrong(Exception):
    """What is wrong with an answer, in words."""


def report(law: Callable[[], None], moral: str) -> None:
    try:
        SEARCH(law)()
    except Wrong as wrong:
        print(f"Not yet. {wrong}")
    except (RuntimeError, TypeError, ValueError) as error:  # torch cannot use it
        print(f"Not yet. The answer has the wrong type or shape: {error}")
    else:
        print(f"Correct. {moral}")


def ask(answer: Answer, *arguments: Any, case: str, returns: int = 1) -> list[Tensor]:
    """The tensors that the answer returns. Wrong if there are none, or not so many."""
    try:
        result = answer(*arguments)
    except Exception as error:
        kind = type(error).__name__
        raise Wrong(f"For {case} it raises {kind}: {error}") from error
    if result is None:
        raise Wrong(f"{answer.__name__} returns nothing so far.")
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != returns:
        raise Wrong(f"It should return {returns} values, not {len(results)}.")
    return [torch.as_tensor(result) for result in results]


def agree(yours: Tensor, right: Tensor, what: str, case: str) -> None:
    """Raise Wrong unless yours is right, up to rounding."""
    try:
        assert_close(yours, right, rtol=1e-4, atol=1e-4, check_dtype=False)
    except AssertionError as error:
        text = f"For {case} {what} is {shown(yours)}, and should be {shown(right)}."
        raise Wrong(text) from error


def shown(tensor: Tensor) -> str:
    tensor = tensor.detach() + 0.0  # no -0
    if tensor.ndim == 2:
        return "[" + ", ".join(shown(row) for row in tensor) + "]"
    if tensor.ndim == 0:
        return f"{tensor:.4g}"
    return "[" + ", ".join(f"{x:.4g}" for x in tensor.tolist()) + "]"


def matrices(rows: int, columns: int, low: int = -3) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.integers(low, 3), min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows).map(torch.Tensor)


def vectors(length: int) -> st.SearchStrategy[Tensor]:
    return matrices(1, length).map(lambda matrix: matrix[0])


@st.composite
def partitions(draw: st.DrawFn, isometric: bool = True) -> Partition:
    """N = q d + r with r < d, so that d = 1, d = N and uneven groups are common."""
    d, q = draw(few), draw(few)
    r = draw(st.integers(0, d - 1))
    return Partition(q * d + r, d, draw(st.integers(0, 99)), isometric)


def embed(answer: Answer) -> None:
    """Exercise 1: answer(theta, coarse, fine) moves the weights as theta does."""

    @given(few, few, st.integers(0, 9), st.data())
    def law(d: int, k: int, more: int, data: st.DataObject) -> None:
        coarse, fine = Partition(k * d + more, d), Partition(k * d + more, k * d)
        theta = data.draw(vectors(d))
        case = f"N = {fine.N}, d = {d}, kd = {k * d}, theta = {shown(theta)}"
        [yours] = ask(answer, theta, coarse, fine, case=case)
        if yours.shape != (fine.d,):
            raise Wrong(f"For {case} its shape is {[*yours.shape]}, not [{fine.d}].")
        agree(fine.expand(yours), coarse.expand(theta), "the update", case)

    report(law, "What d groups can reach, kd groups can reach.")


def other_factors(answer: Answer) -> None:
    """Exercise 2: answer(B, A) has the product B A and is at least 1 away."""

    @given(few, few, few, st.data())
    def law(m: int, n: int, r: int, data: st.DataObject) -> None:
        B, A = data.draw(matrices(m, r, low=1)), data.draw(matrices(r, n, low=1))
        case = f"B = {shown(B)}, A = {shown(A)}"
        B2, A2 = ask(answer, B, A, case=case, returns=2)
        agree(B2 @ A2, B @ A, "the product", case)
        apart = torch.cat([(B2 - B).flatten(), (A2 - A).flatten()]).norm()
        if apart < 0.999:
            raise Wrong(f"For {case} yours are {apart:.3g} away, less than 1.")

    report(law, "One update has many factors; of GPart it has one theta.")


def nearest(answer: Answer) -> None:
    """Exercise 3: answer(P, update) is the theta of least squares."""

    @given(st.booleans().flatmap(partitions), st.data())
    def law(P: Partition, data: st.DataObject) -> None:
        update = data.draw(vectors(P.N))
        case = f"{P}, update = {shown(update)}"
        [yours] = ask(answer, P, update, case=case)
        right = torch.linalg.lstsq(P.dense(torch.float32), update[:, None]).solution
        agree(yours, right[:, 0], "theta", case)

    report(law, "P^T is the least-squares inverse of P.")


def kept(answer: Answer) -> None:
    """Exercise 4: answer(N, d) is the mean share of |g|^2 that |P^T g|^2 keeps."""

    @given(partitions())
    def law(P: Partition) -> None:
        # The mean over N axes is that over random directions: both are tr(P P^T) / N.
        rows = [P.reduce(axis) for axis in torch.eye(P.N)]
        share = torch.stack(rows).square().sum() / P.N
        case = f"N = {P.N}, d = {P.d}"
        [yours] = ask(answer, P.N, P.d, case=case)
        agree(yours, share, "the share", case)

    report(law, "Of the length of a random gradient sqrt(d/N) is left, about.")


def rates(answer: Answer) -> None:
    """Exercise 5: answer(sizes, lr) moves the weights as GPart does, without scale."""

    @given(partitions(), st.sampled_from([0.1, 1.0]), st.data())
    def law(P: Partition, lr: float, data: st.DataObject) -> None:
        raw = Partition(P.N, P.d, P.seed, isometric=False)
        g = data.draw(vectors(P.N))
        case = f"sizes = {shown(P.sizes())}, lr = {lr}, grad_w = {shown(g)}"
        [yours] = ask(answer, P.sizes(), lr, case=case)
        step = raw.expand(yours * raw.reduce(g))
        agree(step, lr * P.expand(P.reduce(g)), "the step of the weights", case)

    report(law, "One learning rate per group undoes what the scale would have done.")


def backward(answer: Answer) -> None:
    """Exercise 6: answer(x, W, theta, ids, scale, grad_y) is autograd's, on dense P."""

    @given(few, few, few, st.integers(0, 99), st.data())
    def law(n: int, columns: int, rows: int, seed: int, data: st.DataObject) -> None:
        P = Partition(rows * columns, data.draw(st.integers(1, rows * columns)), seed)
        x, W = data.draw(matrices(n, columns)), data.draw(matrices(rows, columns))
        theta, grad_y = data.draw(vectors(P.d)), data.draw(matrices(n, rows))
        arguments = (x, W, theta, P.groups(), P.scale(), grad_y)
        case = f"x = {shown(x)}, W = {shown(W)}, theta = {shown(theta)}, "
        case += f"ids = {P.groups().tolist()}, grad_y = {shown(grad_y)}"
        yours = ask(answer, *arguments, case=case, returns=2)

        leaves = x.requires_grad_(), theta.requires_grad_()
        y = x @ (W + (P.dense(torch.float32) @ theta).view_as(W)).T
        right = torch.autograd.grad(y, leaves, grad_y)
        agree(yours[0], right[0], "grad_x", case)
        agree(yours[1], right[1], "grad_theta", case)

    report(law, "This is FusedLinear.backward in gpart.py.")
