"""Fixtures shared by every test folder: the reference material beside the checkout, where there is any."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def _shared(part: str) -> Path:
    folder = SHARED / part
    if not folder.is_dir():
        pytest.skip(f"reference material is not here: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference activations of the original implementations; skips where it is absent."""
    return _shared("goldens")


@pytest.fixture(scope="session")
def speech() -> Path:
    """Folder of real recordings; skips where it is absent."""
    return _shared("speech")
