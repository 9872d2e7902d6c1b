"""`make bench` begins with what tells most, and says what it left out and what disturbed it."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
from conftest import skip_or_fail


@pytest.fixture
def step(monkeypatch):
    for package in ("matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            skip_or_fail(f"{package} is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    step = importlib.import_module("bench.step")
    monkeypatch.setattr(step.report, "_said", set())
    return step


def test_a_first_look_begins_with_adam_and_names_what_it_leaves_out(step, capsys, tmp_path):
    step.main(["--brief", "--seconds", "0", "--device", "cpu", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out after 0 seconds: many_small fp32 adam, many_small fp32 adamw," in printed
    assert json.loads((tmp_path / "step.json").read_text("utf-8"))["results"] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_first_look_has_all_that_it_names(step, device):
    options = step.parse(["--brief", "--device", device])
    named = [(*key, name) for key, names in step.BRIEF[device].items() for name in names]
    assert [*map(step.astuple, step.select_cells(options))] == named


def test_a_log_gets_lines_and_one_word_about_other_programs(step, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "MINIMUM_ROUNDS", 2)
    monkeypatch.setattr(step.report, "SECONDS_PER_LINE", 0)
    seen = {"busy": True, "cores_of_others": 1.26}
    monkeypatch.setattr(step.OtherWork, "seen", lambda self, device: seen)
    few = ["--workloads", "many_small", "mlp_100x10k", "--optimizers", "adam", "--dtypes", "fp32"]
    few += ["--modes", "foreach", "--budget", "0.01"]
    step.main([*few, "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "  many_small fp32 adam 0/2\n" in printed
    assert "  mlp_100x10k fp32 adam 1/2\n" in printed
    assert printed.count("? other programs took up to 1.3 of") == 1
    assert printed.count("?") == 3  # a mark in each table, and what it means
    assert "\r" not in printed and "\x1b" not in printed
