"""Update rules whose classes are to come: plans made by hand against torch's for-loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import assert_near, same_bits

import fusedopt

NO_EXTRAS = (None,) * 6
SHARED = {"weight_decay": 0.0, "l1": 0.0, "maximize": False}
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
RADAM = {**ADAM, "decoupled_weight_decay": False}
DEFAULTS = {
    "adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6},
    "adamax": ADAM,
    "lion": {"lr": 1e-2, "betas": (0.9, 0.99)},
    "radam": RADAM,
}
TORCH = {"adadelta": "Adadelta", "adamax": "Adamax", "radam": "RAdam", "nadam": "NAdam"}
CASES = [
    (rule, options)
    for rule in DEFAULTS
    for options in ({}, {"weight_decay": 0.1, "maximize": True}, {"lr": 0.03})
] + [
    ("radam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("radam", {"betas": (0.5, 0.6)}),  # never rectified
]
every_case = pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
every_rule = pytest.mark.parametrize("rule", DEFAULTS)


class Lion(torch.optim.Optimizer):
    """As published, in the order of the operations of its authors."""

    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2), l1 = group["lr"], group["betas"], group.get("l1", 0)
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                g = -p.grad if group["maximize"] else p.grad
                l1_step = lr * l1 * p.sign()
                p.data.mul_(1 - lr * group["weight_decay"]).sub_(l1_step)
                p.data.sub_(lr * (beta1 * m + (1 - beta1) * g).sign())
                m.copy_(beta2 * m + (1 - beta2) * g)


def oracle(rule, params, options):
    if rule == "lion":
        return Lion(params, {**DEFAULTS[rule], **SHARED, **options})
    stock = {**DEFAULTS[rule], **options, "foreach": False}
    return getattr(torch.optim, TORCH[rule])(params, **stock)


def scales_of(param):
    return torch.zeros(-(-param.numel() // 64))


class Steps:
    """What an optimizer would hand to the native module."""

    def __init__(self, module, rule, params, options, *, capturable=False, coded=False):
        kept = module.rules()[rule]
        self.group = {**DEFAULTS[rule], **SHARED, **options, "capturable": capturable}
        self.group["params"] = list(params)
        self.state = {}
        self.plan = module.Plan(rule, "test")
        if module.KERNEL_DEVICE == "cpu":
            self.tickets = torch.zeros(module.NUM_TICKETS)
            self.plan.add_tickets(self.tickets)
        self.plan.add_group(False, capturable, False, {})
        extras = NO_EXTRAS
        if coded:
            extras = (None,) * 3 + tuple(f"{slot}_scale" for slot in (*kept["slots"], *"ab"))[:3]
        for param in params:
            state = self.state[param] = {s: torch.tensor(0.0) for s in kept["scalars"]}
            for slot in kept["slots"]:
                dtype = param.dtype
                if coded:
                    dtype = torch.uint8 if slot in kept["unsigned"] else torch.int8
                    state[f"{slot}_scale"] = scales_of(param)
                state[slot] = torch.zeros_like(param, dtype=dtype)
            self.plan.add(param, state, tuple(kept["slots"]), extras, True)
        self.plan.finish(self.state)

    def step(self):
        assert self.plan.step([self.group], self.state, 1, None, None, None, None).is_done


def draw(dtype, steps=8):
    values = [torch.randn(shape, dtype=dtype) for shape in ((5,), (17, 33), (4099,))]
    return values, [[torch.randn_like(v) for v in values] for _ in range(steps)]


def run(make, values, grads):
    params = [v.clone() for v in values]
    opt = make(params)
    for now in grads:
        for param, grad in zip(params, now, strict=True):
            param.grad = grad.to(param.dtype)
        opt.step()
    return params, opt


@pytest.fixture(params=["native", "kernels", "capturable"])
def take(request):
    """Makes steps with the native module or with the GPU's kernels on the CPU, which prepare their
    updates themselves if they are capturable."""
    request.getfixturevalue("kernels")
    if request.param == "native":
        return lambda *args: Steps(fusedopt.backend.native, *args)
    module, capturable = request.getfixturevalue("kernels"), request.param == "capturable"
    return lambda *args: Steps(module, *args, capturable=capturable)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_float64_oracle(rule, options, dtype, take):
    values, grads = draw(dtype)
    params, ours = run(lambda p: take(rule, p, options), values, grads)
    wide = dtype if rule == "lion" else torch.float64  # a sign may be that of a rounding
    exact, theirs = run(lambda p: oracle(rule, p, options), [v.to(wide) for v in values], grads)
    for param, expected in zip(params, exact, strict=True):
        assert_near(param, expected, rule, dtype)
        for key, value in theirs.state[expected].items():
            assert_near(ours.state[param][key], value, key, dtype)


@every_rule
def test_l1(rule, take):
    """Decoupled where weight decay is, else part of the gradient."""
    values, grads = draw(torch.float64, 1)
    options = {"l1": 0.1, **({"decoupled_weight_decay": True} if rule == "radam" else {})}
    params, _ = run(lambda p: take(rule, p, options), values, grads)
    if rule in ("radam", "lion"):
        lr = DEFAULTS[rule]["lr"]
        expected, _ = run(lambda p: oracle(rule, p, {}), values, grads)
        expected = [p - lr * 0.1 * v.sign() for p, v in zip(expected, values, strict=True)]
    else:
        grads = [[g + 0.1 * v.sign() for g, v in zip(grads[0], values, strict=True)]]
        expected, _ = run(lambda p: oracle(rule, p, {}), values, grads)
    for ours, theirs in zip(params, expected, strict=True):
        assert_near(ours, theirs, rule, torch.float64)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "8 bits"])
def test_kernels_give_the_bits_of_the_cpu(rule, dtype, coded, kernels):
    values, grads = draw(dtype)
    options = {"weight_decay": 0.1, "l1": 0.01}

    def steps(module, capturable):
        make = partial(Steps, module, rule, capturable=capturable, coded=coded)
        return run(lambda params: make(params, options), values, grads)

    runs = [steps(fusedopt.backend.native, False), steps(kernels, False), steps(kernels, True)]
    params, ours = runs[0]
    for others, theirs in runs[1:]:
        for one, other in zip(params, others, strict=True):
            assert same_bits(one, other)
            for key, value in ours.state[one].items():
                assert same_bits(value, theirs.state[other][key]), key


@every_rule
def test_special_values_go_where_stock_sends_them(rule, take):
    special = torch.tensor([0.0, -0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1e-20])
    values, grad = (c.contiguous() for c in torch.cartesian_prod(special, special).unbind(1))
    grads = [[grad], [grad.roll(5)], [torch.ones_like(grad)]]
    (ours,), _ = run(lambda p: take(rule, p, {}), [values], grads)
    (theirs,), _ = run(lambda p: oracle(rule, p, {}), [values], grads)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(theirs))


def test_rules_say_what_they_keep(native):
    rules = fusedopt.backend.native.rules()
    assert rules["lion"] == {"slots": ["exp_avg"], "unsigned": [], "scalars": []}
    assert rules["adadelta"]["unsigned"] == ["square_avg", "acc_delta"]
    assert rules["nadam"]["scalars"] == ["step", "mu_product"]
    for kept in rules.values():
        assert set(kept["unsigned"]) <= set(kept["slots"])
