"""Agreement with other libraries where they are sound: features without a common mean. Optional: skips without them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cka_addon.estimators import Reference
from cka_addon.hsic import cka_matrix

BENCHMARK = Path(__file__).resolve().parents[2] / "recipes" / "benchmark" / "cka.py"


@pytest.fixture(scope="module")
def libraries():
    """The benchmark's adapters; other modules called "cka" stay as they were."""
    spec = importlib.util.spec_from_file_location("cka_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    path, before = list(sys.path), set(sys.modules)
    spec.loader.exec_module(module)
    yield module.LIBRARIES
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("cka", "cka_pytorch", "torch_cka", "ckatorch"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["pytorch-cka", "cka-pytorch", "torch_cka", "ckatorch"])
def test_agreement_on_mean_free_features(libraries, name):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(96, 16, generator=g)
    xs, ys = (
        [base @ torch.randn(16, d, generator=g) / 4 + torch.randn(96, d, generator=g) for d in widths]
        for widths in ((40, 60), (50,))
    )
    xs, ys = [x - x.mean(0) for x in xs], [y - y.mean(0) for y in ys]
    try:
        theirs = libraries[name](xs, ys)().double().numpy()
    except ImportError as error:
        pytest.skip(f"{error}: pip install --no-deps {name}")
    assert np.abs(cka_matrix(xs, ys) - theirs).max() < 1e-5


def test_only_ours_and_the_float64_one_survive_a_common_mean(libraries):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 64, generator=g) + 50
    y = x[:, :32] + torch.randn(128, 32, generator=g)
    want = Reference.cka(x.double().numpy(), y.double().numpy())
    assert abs(cka_matrix([x], [y])[0, 0] - want) < 1e-6
    try:
        theirs = float(libraries["pytorch-cka"]([x], [y])()[0, 0])
    except ImportError as error:
        pytest.skip(str(error))
    assert not abs(theirs - want) < 1e-2
