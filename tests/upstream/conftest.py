"""Small checkpoints that the upstream tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A small explicitly untrained checkpoint in the project's own format."""
    from s3prl_speaker_upstreams import checkpoints

    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    checkpoint = checkpoints.untrained(
        "speechbrain", seed=3, channels=32, mfa_channels=96, embedding_dim=24, attention_channels=16, se_channels=16
    )
    checkpoints.save_native(checkpoint, path)
    return path
