"""What gradients a program comes with: zeros without memory, and memory of the parameters."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from cases import LAYOUTS, bits
from hypothesis.stateful import rule
from torch import Tensor

from .choices import in_layout, opmath, random_values, randoms
from .training import Training

Part = Callable[[Tensor], Tensor]


class GradientMoves(Training):
    @rule(rng=randoms)
    def zeros_without_memory(self, rng):
        run = self.run
        for p in run.params:
            if rng.random() < 0.3:
                continue
            p.grad = None
            if p.requires_grad and not p.is_complex():
                torch.sgn(p).sum().backward()
            else:
                run.give(p, torch._efficientzerotensor(p.shape, dtype=p.dtype))
        run.step()

    @rule(rng=randoms)
    def negated_when_read(self, rng):
        run = self.run
        for p in run.params:
            values = random_values(rng, p.shape, p.dtype)
            run.give(p, torch._neg_view(values) if rng.random() < 0.7 else values)
        run.step()

    @rule(rng=randoms)
    def gradient_is_the_parameter(self, rng):
        """It is read before anything is written."""
        run = self.run
        p = rng.choice(run.params)
        self.ordinary(rng, p)
        grad = p.detach()
        if p.dim() and len(p) and rng.random() < 0.4:
            grad = grad[:1].expand_as(p)
        elif p.dim() and p.shape[0] == p.shape[-1] and rng.random() < 0.5:
            grad = grad.transpose(0, -1)
        run.give(p, grad)
        run.step()
        run.step()
        p.grad = None

    @rule(rng=randoms)
    def memory_of_another_parameter(self, rng):
        """In a gradient or in a parameter, before or after the other in the order of the loop,
        which says what is read."""
        run = self.run
        others = [p for p in run.params if p.numel() and p.dtype is opmath(p.dtype)]
        if not others or len(run.params) > 4 or "l1" in run.case.options:
            return  # the oracle of l1 makes gradients of its own
        other = rng.choice(others)
        twin_of = {p: q for _, p, q in run.pairs()}
        part = rng.choice(parts_of(other))
        self.ordinary(rng, other)
        is_parameter = rng.random() < 0.4
        if is_parameter:
            p = part(other.detach()).requires_grad_()
            q = part(twin_of[other].detach()).requires_grad_()
        else:
            like = part(other.detach())
            p, around = in_layout(LAYOUTS, rng, random_values(rng, like.shape, like.dtype))
            run.around += [(memory, bits(memory)) for memory in around]
            q = p.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            p.requires_grad_()
        max_norm, run.ours.max_grad_norm = run.ours.max_grad_norm, None
        run.is_entangled = True
        self.add(rng, p, q)
        for _ in range(rng.randint(1, 2)):
            for each in run.params:
                run.give(each, random_values(rng, each.shape, each.dtype))
            if not is_parameter:
                run.give(p, part(other.detach()))
                run.inside[p] = (p.grad, other, part)
            run.step()
        self.remove(p)
        run.is_entangled = False
        run.inside.clear()
        run.ours.max_grad_norm = max_norm

    def ordinary(self, rng: random.Random, p: Tensor) -> None:
        with torch.no_grad():
            p.copy_(random_values(rng, p.shape, p.dtype))

    def add(self, rng: random.Random, *pair: Tensor) -> None:
        options, first = self.run.random_options(rng), rng.random() < 0.5
        for opt, p in zip((self.run.ours, self.run.twin), pair, strict=True):
            opt.add_param_group({"params": [p], **options})
            if first:
                opt.param_groups.insert(0, opt.param_groups.pop())
        self.schedulers = []

    def remove(self, p: Tensor) -> None:
        run = self.run
        at = next(g for g, i, q in run.places() if run.ours.param_groups[g]["params"][i] is p)
        for opt in (run.ours, run.twin):
            (p,) = opt.param_groups.pop(at)["params"]
            opt.state.pop(p, None)


def parts_of(tensor: Tensor) -> list[Part]:
    """Views of some of its elements, or of all of them in another order or dtype."""
    parts: list[Part] = [lambda t: t]
    if tensor.dim():
        parts += [
            lambda t: t[1:],
            lambda t: t[..., :-1],
            lambda t: t[:, ::2] if t.dim() > 1 else t[::2],
            lambda t: t[-1],
            lambda t: t.transpose(0, -1),
        ]
    if tensor.is_complex():
        parts += [torch.view_as_real, torch.view_as_real, lambda t: t.real, lambda t: t.imag]
    return parts
