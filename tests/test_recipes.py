"""Every recipe in bench/recipes runs, agrees with stock, and notices an optimizer that does not.
The files that recipes read may be bad, and the packages that they need may be missing."""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import io
import math
import pickle
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import NAMES
from conftest import skip_or_fail

import fusedopt

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench/recipes"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.py") if "\ndef main(" in p.read_text("utf-8"))
PACKAGES = ("matplotlib", "rich", "sklearn", "optuna")
# The options that a recipe has of these make it short.
SHORT = {"--epochs": "2", "--steps": "60", "--trials": "3"}

every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            skip_or_fail(f"{package} is not installed")
    monkeypatch.syspath_prepend(ROOT)


def module(name):
    return importlib.import_module(f"bench.recipes.{name}")


def run(name, out, *more):
    """A short run on the CPU; what main() returns."""
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    short = [word for option in SHORT.items() if f'"{option[0]}"' in source for word in option]
    assert short, f"{name} has none of the options {', '.join(SHORT)}"
    return module(name).main([*short, "--device", "cpu", "--out", str(out), *more])


# Running --------------------------------------------------------------------------------------


@every_recipe
def test_recipe_agrees_with_stock(name, tmp_path, capsys):
    pairs = run(name, tmp_path)
    for pair in pairs:
        assert len(pair.ours.losses) == len(pair.stock.losses) > 0
        assert all(map(math.isfinite, pair.ours.losses))
        assert pair.ours.losses == pytest.approx(pair.stock.losses, rel=1e-10, abs=1e-10)
        assert pair.roundings().max() <= module(name).ROUNDINGS
        assert pair.stock.step_seconds > 0 and pair.ours.step_seconds > 0
    png = tmp_path / f"{name}.png"
    assert [*tmp_path.iterdir()] == [png] and png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "torch.optim and fusedopt" in printed and "nan" not in printed
    assert all(pair.name in printed for pair in pairs)


@every_recipe
def test_recipe_notices_a_wrong_optimizer(name, tmp_path, monkeypatch, capsys):
    """One whose every step moves the parameters by a millionth too much."""

    def wrong(cls):
        class Wrong(cls):
            def step(self, closure=None):
                loss = super().step(closure)
                with torch.no_grad():
                    for group in self.param_groups:
                        torch._foreach_mul_(group["params"], 1 + 1e-6)
                return loss

        return Wrong

    for optimizer in NAMES:
        monkeypatch.setattr(fusedopt, optimizer, wrong(getattr(fusedopt, optimizer)))
    with pytest.raises(SystemExit, match="disagree.*\n.*rounding errors apart"):
        run(name, tmp_path)
    assert (tmp_path / f"{name}.png").exists()  # to see how it went
    assert "torch.optim and fusedopt" in capsys.readouterr().out


def test_regularization_leaves_the_penalties_to_fusedopt(tmp_path, monkeypatch):
    class WithoutPenalties(fusedopt.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group.update(l1=0.0, weight_decay=0.0)
            return super().step(closure)

    monkeypatch.setattr(fusedopt, "SGD", WithoutPenalties)
    with pytest.raises(SystemExit, match="disagree.*\nL1: .*\nL2: .*\nelastic net: [^\n]*$"):
        run("regularization", tmp_path)


@every_recipe
def test_recipe_says_how_far_it_agrees(name):
    recipe = module(name)
    assert f" {recipe.ROUNDINGS:,} rounding errors" in recipe.__doc__
    assert f"`python -m bench.recipes.{name}`" in (FOLDER / "README.md").read_text("utf-8")


@every_recipe
@pytest.mark.parametrize(
    "options", [["--help"], ["--epochs=0"], ["--steps=0"], ["--dtype=int8"], ["--device=tpu"]]
)
def test_options(name, options, capsys):
    with pytest.raises(SystemExit) as ended:
        module(name).main(options)
    printed = capsys.readouterr()
    assert ended.value.code == (0 if options == ["--help"] else 2)
    assert f"python -m bench.recipes.{name}" in printed.out + printed.err


@pytest.mark.parametrize(
    ("stock", "ours", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 7e-14], "step 2 .* 158 rounding errors apart; 100 are allowed"),
        ([1.0, 0.1], [1.0, 0.1 + 3e-14], "step 2 .* 135 rounding errors"),
        ([1.0, 2.0], [1.0, math.nan], "step 2 "),
        ([math.nan], [math.nan], "step 1 "),
        ([1.0, math.inf], [1.0, math.inf], "step 2 "),
        ([1.0, 2.0], [1.0], "2 steps with torch.optim, 1 with fusedopt"),
        ([1.0], [1.0, 2.0], "1 steps with torch.optim, 2 with fusedopt"),
        ([], [], "0 steps"),
        ([1.0, 2.0, 0.1], [1.0, 2.0 - 4e-14, 0.1 + 2e-14], None),
    ],
)
def test_disagreement(stock, ours, reason):
    side_by_side = module("side_by_side")
    pair = side_by_side.Pair(
        "it", side_by_side.Side(stock), side_by_side.Side(ours), torch.float64, 100
    )
    found = pair.disagreement()
    assert found is None if reason is None else re.search(reason, found)


def test_both_sides_start_alike_and_return_their_results(tmp_path):
    side_by_side = module("side_by_side")
    options = side_by_side.parser("x.py", None, 1).parse_args(["--seed", "5", "--device", "cpu"])
    seen = []

    def train(optim, length):
        seen.append((optim, torch.rand(3).tolist()))
        for step in range(length):
            yield step / 7
        return optim.__name__

    pair = side_by_side.run(options, "it", 4, train, 4)
    assert [optim for optim, _ in seen] == [torch.optim, fusedopt] and seen[0][1] == seen[1][1]
    assert pair.stock.losses == pair.ours.losses == [0, 1 / 7, 2 / 7, 3 / 7]
    assert (pair.stock.result, pair.ours.result) == ("torch.optim", "fusedopt")


# Data -----------------------------------------------------------------------------------------


def test_batches_hold_every_sample_once():
    data = module("data")
    for count in (1, 7, 32, 33, 353):
        samples = data.Samples(torch.arange(count), -torch.arange(count))
        batches = list(samples.batches(32))
        assert len(batches) == samples.steps(32)
        inputs = torch.cat([x for x, _ in batches])
        assert inputs.sort().values.equal(samples.inputs)
        assert torch.cat([y for _, y in batches]).equal(-inputs)
        sizes = [len(x) for x, _ in batches]
        assert max(sizes) <= 32 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "diabetes"])
def test_splits_are_the_same_in_every_run(name):
    load = getattr(module("data"), name)
    first, second = load(), load()
    for part, same in zip(first, second, strict=True):
        assert part.inputs.equal(same.inputs) and part.targets.equal(same.targets)
    rows = {tuple(row) for part in first for row in part.inputs.flatten(1).tolist()}
    assert len(rows) == sum(len(part.targets) for part in first)  # none is in both


@pytest.mark.parametrize("mirror", [False, True])
def test_augmented_images_are_crops(mirror):
    channels, side = random.randint(1, 3), random.choice([8, 12, 32])
    margin = side // 8
    images = torch.rand(40, channels, side, side) + 1
    augmented = module("cnn").augment(images, mirror)
    assert augmented.shape == images.shape
    padded = torch.zeros(40, channels, side + 2 * margin, side + 2 * margin)
    padded[:, :, margin : margin + side, margin : margin + side] = images
    mirrored = 0
    for image, around in zip(augmented, padded, strict=True):
        crops = [
            around[:, top : top + side, left : left + side]
            for top in range(2 * margin + 1)
            for left in range(2 * margin + 1)
        ]
        plain = any(crop.equal(image) for crop in crops)
        assert plain or (mirror and any(crop.flip(2).equal(image) for crop in crops))
        mirrored += not plain
    assert mirrored in range(1, 40) if mirror else mirrored == 0


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, as in the files that CIFAR-10 is distributed in."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_python2_string


def pickled(batch):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(batch)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")  # as numpy 1 did


def write_cifar10(folder, images=4):
    """Six files of random images; the values of the first."""
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (images, 3072))
        labels = [random.randrange(10) for _ in range(images)]
        batch = {b"batch_label": b"one", b"labels": labels, b"data": data.astype(np.uint8)}
        (folder / name).write_bytes(pickled(batch))
        if name == "data_batch_1":
            first = batch
    return first


def test_cifar10(tmp_path):
    batch = write_cifar10(tmp_path)
    train, validation = module("data").cifar10(tmp_path)
    assert train.inputs.shape == (20, 3, 32, 32) and validation.inputs.shape == (4, 3, 32, 32)
    assert train.targets[:4].tolist() == batch[b"labels"]
    for _ in range(20):
        i, c, y, x = (random.randrange(n) for n in (4, 3, 32, 32))
        value = batch[b"data"][i, 1024 * c + 32 * y + x]
        assert train.inputs[i, c, y, x].item() == pytest.approx(value / 255)


def test_cnn_trains_on_cifar10(tmp_path):
    (tmp_path / "data").mkdir()
    write_cifar10(tmp_path / "data")
    (pair,) = run("cnn", tmp_path, "--data", str(tmp_path / "data"))
    assert len(pair.ours.losses) == 2  # 20 images, 2 epochs


class Malicious:
    def __reduce__(self):
        return print, ("this must not run",)

    def __repr__(self):  # in the name of a test, which is the same in every process
        return "Malicious()"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "there is no .*data_batch_3; it should be the folder cifar-10-batches-py"),
        (b"", "data_batch_3 is not a batch of CIFAR-10"),
        (b"<html>404</html>", "data_batch_3 is not a batch of CIFAR-10"),
        ("truncated", "data_batch_3 is not a batch of CIFAR-10"),
        ([1, 2], "data_batch_3 is not a batch of CIFAR-10"),
        (Malicious(), "data_batch_3 is not a batch of CIFAR-10: it asks for .*print"),
        ({b"data": None}, r"data_batch_3.* \(\)"),
        ({b"data": np.zeros((4, 3072))}, "should be uint8 .* but is float64"),
        ({b"data": np.zeros((4, 784), np.uint8)}, r"\(images, 3072\), .* \(4, 784\)"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "0 images"),
        ({b"labels": [1, 2, 3]}, "4 images, but labels of shape"),
        ({b"labels": [1, 2, 3, 10]}, "a label is not one of 0 to 9"),
        ({b"labels": [1, 2, 3, -1]}, "a label is not one of 0 to 9"),
        ({b"labels": [1, 2, 3, 0.5]}, "a label is not one of 0 to 9"),
        ({b"labels": ["cat"] * 4}, "data_batch_3 is not a batch of CIFAR-10"),
        ("no labels", "data_batch_3 has no entry b'labels'"),
    ],
    ids=str,
)
def test_bad_cifar10(bad, reason, tmp_path, capsys):
    good = write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3"
    if bad is None:
        path.unlink()
    elif isinstance(bad, bytes):
        path.write_bytes(bad)
    elif bad == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif bad == "no labels":
        path.write_bytes(pickled({b"data": good[b"data"]}))
    else:
        path.write_bytes(pickled(good | bad if isinstance(bad, dict) else bad))
    with pytest.raises(SystemExit, match=rf"--data: (?s:.*){reason}"):
        run("cnn", tmp_path, "--data", str(tmp_path))
    assert "this must not run" not in capsys.readouterr().out


def idx(values):
    header = bytes([0, 0, 8, values.ndim])
    return header + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


def write_mnist(folder, packed, **replaced):
    generator = np.random.default_rng(random.getrandbits(32))
    parts = {}
    for part, count in (("train", 40), ("t10k", 8)):
        images = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = generator.integers(0, 10, count).astype(np.uint8)
        parts |= {f"{part}_images_idx3": images, f"{part}_labels_idx1": labels}
    for name, values in (parts | replaced).items():
        if values is None:
            continue
        content = values if isinstance(values, bytes) else idx(values)
        path = folder / f"{name.replace('_', '-')}-ubyte{'.gz' * packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return parts


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(packed, tmp_path):
    (tmp_path / "data").mkdir()
    parts = write_mnist(tmp_path / "data", packed)
    train, validation = module("data").mnist(tmp_path / "data")
    for samples, part in ((train, "train"), (validation, "t10k")):
        images = torch.from_numpy(parts[f"{part}_images_idx3"]).unsqueeze(1) / 255
        assert samples.inputs.equal(images)
        assert samples.targets.tolist() == parts[f"{part}_labels_idx1"].tolist()
    (pair,) = run("softmax_classifier", tmp_path, "--data", str(tmp_path / "data"))
    assert len(pair.ours.losses) == 4  # 40 images, batches of up to 32, 2 epochs


BYTES = np.zeros(40, np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train_images_idx3", None, "there is no .*train-images-idx3-ubyte"),
        ("t10k_labels_idx1", None, "there is no .*t10k-labels-idx1-ubyte"),
        ("train_images_idx3", b"", "not an idx file of bytes in 3 dimensions"),
        ("train_images_idx3", b"<html>404</html>", "not an idx file of bytes in 3 dimensions"),
        ("train_images_idx3", idx(BYTES), "not an idx file of bytes in 3 dimensions"),
        ("train_images_idx3", idx(BYTES.reshape(40, 1, 1)), r"shape \(1, 1, 1\), expected"),
        ("train_images_idx3", idx(np.zeros((0, 28, 28), np.uint8)), "announces"),
        ("train_labels_idx1", idx(BYTES)[:-1], r"announces \[40\] values and holds 39"),
        ("train_labels_idx1", idx(BYTES) + b"\0", r"announces \[40\] values and holds 41"),
        ("train_labels_idx1", idx(BYTES[:39]), "40 images, but labels of shape"),
        ("train_labels_idx1", idx(BYTES + 10), "a label is not one of 0 to 9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_mnist(packed, name, content, reason, tmp_path):
    write_mnist(tmp_path, packed, **{name: content})
    with pytest.raises(SystemExit, match=f"--data: .*{reason}"):
        run("softmax_classifier", tmp_path, "--data", str(tmp_path))


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"no gzip"])
def test_damaged_gz(damage, tmp_path):
    write_mnist(tmp_path, True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match="--data: .*train-labels-idx1-ubyte.gz cannot be unpacked"):
        run("softmax_classifier", tmp_path, "--data", str(tmp_path))


def test_labels_stay_integers():
    options = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float64)
    samples = module("data").Samples(torch.rand(3, 2), torch.tensor([1, 0, 9])).to(options)
    assert (samples.inputs.dtype, samples.targets.dtype) == (torch.float64, torch.int64)


# Missing packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package(package, tmp_path):
    """In a process of its own, in which the package cannot be imported."""
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None\n"
        "sys.argv[1:] = ['--trials', '1', '--out', sys.argv[1]]\n"
        "runpy.run_module('bench.recipes.hyperparameter_search', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"needs {package}, which is not installed" in done.stderr
    assert 'pip install "fusedopt[recipes]"' in done.stderr
    assert "Traceback" not in done.stderr
