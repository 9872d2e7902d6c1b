"""Parameters and state that overlap."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, gradient_like, richest_and_stateless, richest_by_options

from overlaps import compare, fresh, leaf_of, rand

PARAMETERS = {
    "overlapping halves": lambda b: [b[: len(b) // 2 + 1], b[len(b) // 2 - 1 :]],
    "one inside of the other": lambda b: [b, b[2:5]],
    "inside, listed first": lambda b: [b[2:5], b],
    "three in a row": lambda b: [b[:4], b[2:6], b[5:]],
    "interleaved": lambda b: [b[::2], b[1::2]],
    "interleaved and whole": lambda b: [b[::2], b, b[1::2]],
    "square and transposed": lambda b: [b[:4].view(2, 2), b[:4].view(2, 2).t()],
    "diagonal": lambda b: [b[:4].view(2, 2), b[:4].view(2, 2).diagonal()],
    "shape of its own": lambda b: [b[:6].view(2, 3), b[:6].view(3, 2)],
    "same memory three times": lambda b: [b, b.view(-1), b[:]],
    "one element": lambda b: [b[0], b[:1], b[:3]],
    "with a gap": lambda b: [b[:3], b[3:], b[2:4]],
}


@richest_and_stateless
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_overlap(case, kind, size, backend):
    def build():
        base = rand(size)
        params = [leaf_of(v) for v in PARAMETERS[kind](base)]
        return params, fresh(*params), [base]

    compare(case, build)


@richest_by_options
@pytest.mark.parametrize("way", ["of two parameters", "shifted", "the parameter of another"])
def test_state_that_overlaps(case, size, way, backend):
    made = []
    for build in (case.ours, case.stock):
        torch.manual_seed(8)
        memory = torch.rand(size + 2, dtype=torch.float64) + 0.5
        params = [leaf_of(rand(size)) for _ in range(3)]
        opt = build(params)
        for at in range(4):
            for p in params:
                p.grad = gradient_like(p)
            opt.step()
            if at != 1:
                continue
            # Of a mean that is not one the root of a negative variance would be taken.
            for key in [k for k in opt.state[params[0]] if k not in ("step", "grad_avg")]:
                memory[:size] = opt.state[params[0]][key]
                if way == "the parameter of another":
                    if "sq" in key or key in ("square_avg", "sum"):
                        continue  # squares are not negative
                    opt.state[params[0]][key] = params[1].detach()
                    break
                shift = 1 if way == "shifted" else 0
                opt.state[params[0]][key] = memory[shift : size + shift]
                opt.state[params[2]][key] = memory[:size]
                memory = torch.rand(size + 2, dtype=torch.float64) + 0.5
        made.append((opt, params))
    for p, q in zip(made[0][1], made[1][1], strict=True):
        assert_near(p, q)
