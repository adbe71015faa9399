# SPDX-License-Identifier: Apache-2.0
"""The partition behind P: what a seed means, for every index, slice, N and d.

A seed is the storage format, so pi and g are compared with format/make_vectors.py,
which says them again in plain integers, one index at a time.
"""

import concurrent.futures
import contextlib
import math
import re
import runpy
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpart
from gpart import Partition, permute, round_function, round_keys
from test_properties import SEEDS, assert_close, dense, partitions, sizes, vectors

SPECIFICATION = runpy.run_path(
    str(Path(__file__).parents[1] / "format" / "make_vectors.py")
)


def integers(values):
    return torch.tensor(list(values), dtype=torch.int64)


# --- The format ---
GOLDEN = [  # N, seed, pi(0), pi(1), ..., CRC-32 of pi(0..N-1) as little-endian int64
    (6, 0, "2 3 4 0 1 5", 0x34555F7A),
    (12, 42, "10 7 8 5 9 3 2 6 4 1 0 11", 0xFF719BAE),
    (1000, 0, "797 313 182 843 883 494 433 24 736 938 265 596", 0xE1DEFC76),
    (
        65536,
        0,
        "63495 61759 50020 16914 54213 58783 39364 31582 27658 41251 53169 37129",
        0x4C8A68F1,
    ),
    (
        14155776,
        0,
        "8851087 3660970 5812129 1328578 12909139 235528 8291414 4263969 4323443 "
        "8921921 11763214 12880720",
        0x5CC2C6C3,
    ),
]


@pytest.mark.parametrize(
    ("N", "seed", "first", "crc"), GOLDEN, ids=[f"N={row[0]}" for row in GOLDEN]
)
def test_golden_vectors(N, seed, first, crc):
    """pi is for ever what it was when a file was written."""
    pi = Partition(N, N, seed).groups()  # g = pi at d = N
    assert torch.equal(pi[:12].long(), integers(map(int, first.split())))
    assert_close(zlib.crc32(pi.numpy().astype("<i8").tobytes()), crc, rtol=0, atol=0)


@given(SEEDS, st.integers(0, 2**31 - 1))
@example(2**64 - 1, 2**31 - 1)
def test_round_keys_and_function_are_the_specification(seed, x):
    """Each of 16 and of 6 round keys, and F(k, x) with each, below 2^31."""
    for N, rounds in [(12, 16), (2**16, 6)]:
        keys = round_keys(seed, rounds)
        assert torch.equal(
            integers(keys), integers(SPECIFICATION["round_keys"](N, seed))
        )
        for key in keys:
            image = round_function(key, integers([x]))
            assert torch.equal(image, integers([SPECIFICATION["F"](key, x)]))


@st.composite
def slices(draw):
    """A partition of up to 2^62 weights, often beside a square or a power of two,
    where the grid changes its shape, and a slice of it."""
    square = st.integers(1, 2**31).map(lambda x: x * x)
    power = st.integers(0, 62).map(lambda k: 2**k)
    N = draw(st.integers(1, 2**62) | square | power) + draw(st.integers(-1, 1))
    N = min(max(N, 1), 2**62)
    d = draw(st.integers(1, min(N, 2**31 - 1)))
    start = draw(st.integers(0, N))
    stop = min(N, start + draw(st.integers(0, 20)))
    return Partition(N, d, draw(SEEDS)), start, stop


@given(slices())
@example((Partition(2**62, 2**31 - 1, 2**64 - 1), 2**62 - 20, 2**62))
@example((Partition(65535, 65535, 1), 0, 20))  # 16 rounds
@example((Partition(65536, 65536, 1), 0, 20))  # 6 rounds
def test_groups_follow_the_format(case):
    """groups(start, stop) is [pi(i) mod d for i in start..stop-1]."""
    partition, start, stop = case
    N, d, seed = partition.N, partition.d, partition.seed
    expected = [SPECIFICATION["permute"](N, seed, i) % d for i in range(start, stop)]
    assert torch.equal(partition.groups(start, stop).long(), integers(expected))


# --- Sizes and bijection ---
@st.composite
def large_partitions(draw):
    N = draw(st.integers(1, 100_000))
    d = draw(st.integers(1, N))
    return Partition(N, d, draw(SEEDS))


@given(large_partitions())
@example(Partition(65535, 65534))
@example(Partition(65536, 17))
@example(Partition(70_000, 70_000))
@example(Partition(70_000, 1))
def test_sizes_differ_by_at_most_one(partition):
    """n_j = #{i: g(i) = j} = floor(N/d) + [j < N mod d]: no group is empty."""
    q, r = divmod(partition.N, partition.d)
    counted = torch.bincount(partition.groups(), minlength=partition.d)
    assert torch.equal(partition.sizes(), counted)
    assert torch.equal(counted, integers([q + 1] * r + [q] * (partition.d - r)))


@given(st.integers(1, 100_000), SEEDS)
@example(65535, 0)
@example(65536, 0)
def test_pi_is_a_bijection(N, seed):
    """{pi(0), ..., pi(N-1)} = {0, ..., N-1}, in any order of the indices."""
    i = torch.arange(N)
    pi = permute(i, N, seed)
    assert torch.equal(pi.sort().values, i)
    assert torch.equal(i, torch.arange(N))  # what is asked about is left alone
    assert torch.equal(permute(i.flip(0), N, seed), pi.flip(0))


# --- Random access ---
@given(partitions(True), st.data())
def test_any_slice_is_that_slice_of_the_whole(partition, data):
    """groups(start, stop) = groups()[start:stop], int32."""
    start = data.draw(st.integers(0, partition.N))
    stop = data.draw(st.integers(start, partition.N))
    whole = partition.groups()
    assert torch.equal(partition.groups(start, stop), whole[start:stop])
    assert torch.equal(partition.groups(start), whole[start:])
    assert_close(whole, whole.int())  # assert_close compares dtypes too


def test_slices_across_chunks():
    """However the work is cut: slices that start and stop around powers of two."""
    partition = Partition(200_000, 137, seed=5)
    whole = permute(torch.arange(partition.N), partition.N, partition.seed) % 137
    assert torch.equal(partition.groups().long(), whole)
    edges = [0, 1, 32_767, 32_768, 32_769, 65_535, 65_537, 131_073, 200_000]
    for start in edges:
        for stop in edges[edges.index(start) :]:
            part = partition.groups(start, stop)
            assert torch.equal(part.long(), whole[start:stop])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


SURROUNDINGS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "one thread": lambda: threads(1),
    "three threads": lambda: threads(3),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_nothing_around_changes_the_partition(surrounding):
    """Same ids, sizes and scale, and the global random state is left alone."""
    partition = Partition(100_000, 37, seed=3)
    expected = partition.groups(), partition.sizes(), partition.scale()
    state = torch.get_rng_state()
    with surrounding():
        got = partition.groups(), partition.sizes(), partition.scale()
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_work_is_cut_into_chunks_for_all_threads(monkeypatch):
    """A chunk on a CPU has 2^15 ids, whatever N, and there is a thread for each core
    that torch may use."""
    lengths, counts = [], []

    def pool(count):
        counts.append(count)
        return concurrent.futures.ThreadPoolExecutor(count)

    def seen(i, N, seed):
        lengths.append(len(i))
        return permute(i, N, seed)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(gpart, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(gpart, "permute", seen)
    Partition(100_000, 37).groups(1)
    assert counts == [3]
    first = [n for n in lengths if n > 172]  # 317 x 316 - N walk on, and fewer again
    assert sorted(first) == [99_999 % 2**15, 2**15, 2**15, 2**15]


@pytest.mark.parametrize("what", ["groups", "scale"])
def test_the_result_is_on_the_device_that_is_asked_for(what):
    """Built on the host for one that is neither CPU nor CUDA, as meta is here."""
    partition = Partition(9, 5)
    assert getattr(partition, what)().device.type == "cpu"
    assert getattr(partition, what)(device="meta").device.type == "meta"
    for vector, call in ((5, partition.expand), (9, partition.reduce)):
        assert call(torch.ones(vector, device="meta")).device.type == "meta"


@pytest.mark.parametrize("start, stop", [(-1, 3), (4, 3), (0, 10), (10, 10)])
def test_a_slice_beyond_the_whole_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"^need 0 <= {start=} <= {stop=} <= N$"):
        Partition(9, 5).groups(start, stop)


@pytest.mark.parametrize("N", [-1, 0, 2**62 + 1])
def test_an_N_out_of_range_is_refused(N):
    with pytest.raises(ValueError, match=rf"^N must be in 1\.\.2\^62, got {N}$"):
        Partition(N, 1)


def test_the_largest_N_and_d_are_allowed():
    """Ids are int32, so d is below 2^31."""
    assert Partition(2**62, 2**31 - 1).groups(2**62 - 3).dtype == torch.int32
    for d in (2**31, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"^d must be below 2\^31, .* got {d}$"):
            Partition(2**62, d)


# --- d = 1 and d = N ---
@given(st.integers(1, 200), SEEDS, st.data())
def test_one_group_is_one_shared_scalar(N, seed, data):
    """d = 1: (P t)_i = t / sqrt(N) for every i."""
    t = data.draw(vectors(1))
    assert_close(Partition(N, 1, seed).expand(t), (t / math.sqrt(N)).expand(N))


@given(st.integers(1, 30), SEEDS, st.booleans(), st.data())
def test_N_groups_are_full_fine_tuning(N, seed, isometric, data):
    """d = N: P is a permutation matrix, and P P^T w = w exactly."""
    partition, w = Partition(N, N, seed, isometric), data.draw(vectors(N))
    assert torch.equal(partition.expand(partition.reduce(w)), w)


# --- The image of P ---
@given(partitions(True), st.data())
def test_P_PT_is_the_orthogonal_projection(partition, data):
    """Q = P P^T: Q Q = Q, Q^T = Q, trace Q = d; and expand(reduce(w)) = Q w."""
    w = data.draw(vectors(partition.N))
    Q = dense(partition) @ dense(partition).T
    assert_close(Q @ Q, Q)
    assert_close(Q.T, Q)
    assert_close(Q.trace().item(), float(partition.d))
    assert_close(partition.expand(partition.reduce(w)), Q @ w)


@given(partitions(True, False), st.data())
def test_reduce_finds_the_nearest_theta(partition, data):
    """argmin_t ||w - P t|| = P^T w; without isometry P^T w / n."""
    w = data.draw(vectors(partition.N))
    nearest = torch.linalg.lstsq(dense(partition), w).solution
    gram = 1.0 if partition.isometric else sizes(partition)
    assert_close(partition.reduce(w) / gram, nearest)


# --- Nesting ---
@st.composite
def nested(draw):
    """P_d and P_kd of equal N, seed and variant, k d <= N."""
    coarse = draw(partitions(True, False))
    N, d, seed, isometric = vars(coarse).values()
    return coarse, Partition(N, d * draw(st.integers(1, N // d)), seed, isometric)


@given(nested(), st.data())
def test_nesting(pair, data):
    """g_d = g_kd mod d: image(P_d) is inside image(P_kd), so that a trained theta goes
    on in a finer partition: s_j = t_(j mod d) scale^d_(j mod d) / scale^kd_j."""
    coarse, fine = pair
    t = data.draw(vectors(coarse.d))
    assert torch.equal(coarse.groups(), fine.groups() % coarse.d)
    j = torch.arange(fine.d) % coarse.d
    s = (t * coarse.scale(dtype=t.dtype))[j] / fine.scale(dtype=t.dtype)
    assert_close(fine.expand(s), coarse.expand(t))
    gram = 1.0 if fine.isometric else sizes(fine)
    assert_close(fine.reduce(coarse.expand(t)) / gram, s)


# --- Statistics: what seeds and indices have to do with each other ---
def relation(g, h, d):
    """How far two assignments are from independent: the chi-square of their d x d table
    of joint counts, in standard deviations. About 0 if unrelated, N/sqrt(2) for a copy,
    renamed or not."""
    table = torch.bincount(g.long() * d + h, minlength=d * d).double()
    expected, freedom = len(g) / d**2, (d - 1) ** 2
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def assert_unrelated(relations):
    """Within ten standard deviations."""
    for value in relations:
        assert_close(value, 0.0, rtol=0, atol=10)


@pytest.mark.parametrize("N", [1024, 2**16])
def test_relation_sees_copies(N):
    """The measure of these tests: a renamed copy is N/sqrt(2) deviations off."""
    g = Partition(N, 8).groups()
    assert_close(relation(g, (g + 3) % 8, 8), N / math.sqrt(2), rtol=0.01, atol=0)


@pytest.mark.parametrize("N", [1024, 2**16])
@settings(max_examples=5)
@given(st.integers(0, 2**64 - 2))
def test_neighbouring_seeds_are_unrelated(N, seed):
    """g_(s+1) is independent of g_s and of its shifts."""
    g, h = Partition(N, 8, seed).groups(), Partition(N, 8, seed + 1).groups()
    assert_unrelated(relation(g.roll(shift), h, 8) for shift in range(-16, 17))


@settings(max_examples=3)
@given(SEEDS)
@example(0)
@example(2**64 - 1)
def test_each_bit_of_the_seed_matters(seed):
    """For each of the 64 bits, flipping it gives an unrelated partition."""
    g = Partition(1024, 8, seed).groups()
    flipped = (Partition(1024, 8, seed ^ 1 << bit).groups() for bit in range(64))
    assert_unrelated(relation(g, h, 8) for h in flipped)


@pytest.mark.parametrize("N", [4096, 2**16])
def test_neighbouring_weights_are_unrelated(N):
    """g(i + k) is independent of g(i): along a row, down a column, across the grid."""
    a = math.isqrt(N - 1) + 1
    for seed in range(3):
        g = Partition(N, 8, seed).groups()
        assert_unrelated(relation(g, g.roll(k), 8) for k in (1, 2, 3, a - 1, a, a + 1))


def test_all_permutations_are_equally_likely():
    """Over 1200 seeds the 24 permutations of 4 weights come up 50 times each, by
    chi-square."""
    i = torch.arange(4)
    digits = integers([64, 16, 4, 1])
    codes = torch.stack([permute(i, 4, seed) @ digits for seed in range(1200)])
    counts = torch.bincount(codes, minlength=256)
    counts = counts[counts > 0].double()
    assert_close(len(counts), 24)
    chi2 = ((counts - 50) ** 2 / 50).sum().item()
    assert_close(chi2, 23.0, rtol=0, atol=4 * math.sqrt(2 * 23))


@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("d", [1, 5, 9])
def test_dense_is_P(d, isometric):
    partition = Partition(9, d, 3, isometric)
    P = dense(partition)
    with torch.device("meta"):  # is not asked
        assert_close(partition.dense(), P)
    assert_close(partition.dense(torch.float32), P.float(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (8,), (5, 1), (9, 1)], ids=str)
def test_what_is_no_vector_of_that_length_is_refused(shape):
    """Not even one number, which torch would spread over all."""
    partition, v = Partition(9, 5), torch.ones(shape)
    got = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"^need a vector \[5\], got {got}$"):
        partition.expand(v)
    with pytest.raises(ValueError, match=rf"^need a vector \[9\], got {got}$"):
        partition.reduce(v)


# --- Every (N, d) up to 20, not sampled ---
@pytest.mark.parametrize("N", range(1, 21))
def test_every_small_partition(N):
    """For each d: pi is a bijection, g = pi mod d, entries are Eq. 7's, P^T P is I or
    diag(n), expand and reduce are the dense products."""
    seed = 2**64 - N
    pi = integers(SPECIFICATION["permute"](N, seed, i) for i in range(N))
    assert torch.equal(pi.sort().values, torch.arange(N))
    w = torch.linspace(-1, 2, N, dtype=torch.float64)
    for d in range(1, N + 1):
        t = torch.linspace(2, -1, d, dtype=torch.float64)
        ones = (pi[:, None] % d == torch.arange(d)).double()
        n = ones.sum(0)
        for isometric in (True, False):
            partition = Partition(N, d, seed, isometric)
            P = ones / n.sqrt() if isometric else ones
            assert_close(partition.dense(), P)
            assert_close(partition.dense(torch.float32), P.float(), rtol=0, atol=0)
            assert_close(P.T @ P, torch.eye(d).double() if isometric else n.diag())
            assert_close(partition.expand(t), P @ t)
            assert_close(partition.reduce(w), P.T @ w)


@pytest.mark.parametrize("N", range(1, 21))
def test_every_small_nesting(N):
    """g_d = g_kd mod d for every d and every multiple kd <= N."""
    groups = [Partition(N, d, N).groups() for d in range(1, N + 1)]
    for d in range(1, N + 1):
        for kd in range(d, N + 1, d):
            assert torch.equal(groups[d - 1], groups[kd - 1] % d)
