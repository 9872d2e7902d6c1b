"""What an optimizer keeps is said three times, for Python, for the kernels and for the tests: these
must agree, in order."""

from __future__ import annotations

import inspect

import pytest
import seam
from cases import NAMES, TABLES, every_name

import fusedopt


@every_name
@pytest.mark.usefixtures("native")
def test_the_native_module_keeps_the_same(name):
    rule = seam.rule_of(getattr(fusedopt, name))
    assert fusedopt.backend.native.rules()[rule.name] == {
        "slots": [slot.name for slot in rule.slots],
        "unsigned": [slot.name for slot in rule.slots if slot.unsigned],
        "scalars": [scalar.name for scalar in rule.scalars],
    }


@every_name
def test_the_tests_know_the_same(name):
    rule, table = seam.rule_of(getattr(fusedopt, name)), TABLES[name]
    assert [*table.slots] == [slot.name for slot in rule.slots]
    assert table.unsigned == {slot.name for slot in rule.slots if slot.unsigned}
    assert table.counts_steps == rule.counts_steps
    assert table.takes_sparse == (rule.sparse_update is not None)
    assert table.makes_state_at_once == rule.stock_starts_with_state
    assert {*table.extras} <= {*rule.switches}
    for options in table.cases:
        group = {**defaults(name), **options}
        assert table.slots_of(group) == tuple(slot.name for slot in rule.slots_of(group))


def defaults(name):
    parameters = inspect.signature(getattr(fusedopt, name)).parameters
    known = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    return {"decoupled_weight_decay": name == "AdamW", **known}


def test_every_class_has_a_table():
    classes = {name for name in fusedopt.__all__ if inspect.isclass(getattr(fusedopt, name))}
    assert classes == {*NAMES} == {*seam.classes()}
