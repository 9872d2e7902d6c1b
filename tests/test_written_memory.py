"""csrc/plan/written_memory: who writes the same bytes, against a search of all pairs."""

from __future__ import annotations

import ctypes
import random

import pytest
from conftest import compiled


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """tests/native/written_memory.cpp, as functions."""
    module = compiled(tmp_path_factory.mktemp("native"), "written_memory", "-O1")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    module.overlaps.argtypes = [pointer, number, pointer, number, pointer, pointer]
    module.overlaps.restype = number
    module.range_of.argtypes = [number, ctypes.c_int, pointer, pointer, number, pointer]
    return module


def words(values):
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def overlaps(library, ranges, queries):
    sharing = words([0] * len(ranges) * 2)
    overlapping = words([0] * (len(queries) * (len(ranges) + 1)))
    flat = [word for begin, end, owner in ranges for word in (begin, end, owner)]
    asked = [word for query in queries for word in query]
    found = library.overlaps(
        words(flat), len(ranges), words(asked), len(queries), sharing, overlapping
    )
    answers, at = [], 0
    for _ in queries:
        owners = []
        while overlapping[at] >= 0:
            owners.append(overlapping[at])
            at += 1
        at += 1
        answers.append(sorted(owners))
    return list(sharing[:found]), answers


def meet(a, b) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def test_random_ranges(library):
    for _ in range(500):
        space = random.choice([10, 100, 10_000])
        longest = random.choice([1, 5, space])

        def some(space=space, longest=longest):
            begin = random.randrange(1, space)
            return begin, begin + random.randrange(longest + 1)

        ranges = [(*some(), random.randrange(8)) for _ in range(random.randrange(20))]
        queries = [some() for _ in range(10)]
        sharing, answers = overlaps(library, ranges, queries)
        filled = [r for r in ranges if r[0] < r[1]]
        for i, a in enumerate(filled):
            for b in filled[:i]:
                if meet(a, b):  # also if both are of one owner: whose own order matters then
                    assert {a[2], b[2]} <= {*sharing}
        for owner in sharing:
            assert any(
                meet(a, b)
                for i, a in enumerate(filled)
                for j, b in enumerate(filled)
                if i != j and owner in (a[2], b[2])
            )
        assert sharing == sorted({*sharing})
        for query, answer in zip(queries, answers, strict=True):
            if query[0] < query[1]:
                assert answer == sorted(r[2] for r in filled if meet(r, query))


def test_neighbours_share_nothing(library):
    ranges = [(at, at + 16, at // 16) for at in range(16, 1600, 16)]
    sharing, (inside, between) = overlaps(library, ranges, [(33, 34), (47, 65)])
    assert sharing == []
    assert inside == [2] and between == [2, 3, 4]


def test_a_long_range_reaches_past_the_next(library):
    ranges = [(16, 1000, 0), (32, 48, 1), (64, 80, 2), (992, 1008, 3), (1008, 1024, 4)]
    sharing, (behind,) = overlaps(library, ranges, [(900, 901)])
    assert sharing == [0, 1, 2, 3] and behind == [0]


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((), (), (0, 4)),
        ((5,), (1,), (0, 20)),
        ((5,), (2,), (0, 36)),
        ((5,), (0,), (0, 4)),
        ((2, 3), (3, 1), (0, 24)),
        ((2, 3), (100, 1), (0, 412)),
        ((0, 3), (3, 1), (0, 0)),
        ((1, 3), (999, 1), (0, 12)),
        ((3,), (-1,), (-8, 4)),
        ((2, 3), (-3, 1), (-12, 12)),
    ],
)
def test_the_bytes_of_a_tensor(library, shape, strides, expected):
    out = words([0, 0])
    library.range_of(1000, len(shape), words(shape), words(strides), 4, out)
    assert (out[0] - 1000, out[1] - 1000) == expected
