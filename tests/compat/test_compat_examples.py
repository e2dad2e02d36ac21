"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

pytestmark = pytest.mark.compat

MODULES = ["", "._hooks", ".devices", ".numpy_names", ".samplers", ".silence", ".sox_effects", ".torchaudio_io"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"s3prl_speaker_upstreams.compat{name}"))
    assert result.attempted > 0 and result.failed == 0
