"""huggingface_hub's removed names: importable, truthful where possible, raising where not. No network."""

from __future__ import annotations

import types

import huggingface_hub
import pytest

from s3prl_speaker_upstreams.compat import hub_names
from s3prl_speaker_upstreams.compat._errors import RemovedApi

pytestmark = pytest.mark.compat


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setattr(hub_names, "_stored_token", lambda: "hf_stored")


@pytest.fixture
def no_token(monkeypatch):
    monkeypatch.setattr(hub_names, "_stored_token", lambda: None)


def test_stored_token_is_the_hubs_own(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_environment")
    assert hub_names.HfFolder.get_token() == "hf_environment"
    if hasattr(huggingface_hub, "HfFolder") and huggingface_hub.HfFolder is not hub_names.HfFolder:
        assert huggingface_hub.HfFolder.get_token.__name__ == hub_names.HfFolder.get_token.__name__


def test_the_token_of_s3prls_login_can_be_saved(token):
    """run_downstream.py:187: token = HfApi().login(...); HfFolder.save_token(token)."""
    hub_names.HfFolder.save_token(hub_names.login(object(), username="a", password="b"))
    with pytest.raises(RemovedApi, match="hf auth login"):
        hub_names.HfFolder.save_token("hf_other")


def test_without_a_token_login_says_what_to_do(no_token):
    with pytest.raises(RemovedApi, match="no longer takes passwords; run `hf auth login`"):
        hub_names.login(object(), username="me", password="secret")
    with pytest.raises(RemovedApi):
        hub_names.HfFolder.save_token(None)
    with pytest.raises(RemovedApi, match="hf auth logout"):
        hub_names.HfFolder.delete_token()


def test_password_is_not_repeated(no_token):
    with pytest.raises(RemovedApi) as caught:
        hub_names.login(object(), username="me", password="secret")
    assert "secret" not in str(caught.value)


def test_repository_raises_and_says_that_the_training_is_safe():
    with pytest.raises(RemovedApi, match="exp/hub.*hf upload"):
        hub_names.Repository(local_dir="exp/hub", clone_from="x", use_auth_token="t")


def test_old_create_repo_call_becomes_the_new_one():
    calls = []

    class Api:
        def create_repo(self, repo_id, *, token=None, private=None, exist_ok=False):
            calls.append((repo_id, token, private, exist_ok))

    api = hub_names.make_runner_api(Api)()
    api.create_repo(token="t", name="model", organization="lab", exist_ok=True, private=False)
    api.create_repo(token="t", name="model", organization=None)
    api.create_repo("lab/other")
    assert calls == [("lab/model", "t", False, True), ("model", "t", None, False), ("lab/other", None, None, False)]
    with pytest.raises(TypeError):
        api.create_repo("a/b", unknown=1)


def test_old_download_call_becomes_the_new_one(monkeypatch, token):
    calls = []
    from huggingface_hub import _snapshot_download

    monkeypatch.setattr(_snapshot_download, "snapshot_download", lambda repo, **kwargs: calls.append((repo, kwargs)))
    hub_names.snapshot_download("lab/model", "abc", use_auth_token=True)
    hub_names.snapshot_download("lab/model")
    assert calls == [("lab/model", {"revision": "abc", "token": True}), ("lab/model", {"revision": None})]


def test_runner_gets_it_for_its_own_call_only():
    original = huggingface_hub.snapshot_download

    class Runner:
        args = types.SimpleNamespace(from_hf_hub=True)

        def _get_upstream(self):
            from huggingface_hub import snapshot_download

            assert snapshot_download is (hub_names.snapshot_download if self.args.from_hf_hub else original)
            raise KeyError("reached")

    hub_names.wrap_get_upstream(Runner)
    runner = Runner()
    for from_hub in (True, False):
        runner.args = types.SimpleNamespace(from_hf_hub=from_hub)
        with pytest.raises(KeyError, match="reached"):
            runner._get_upstream()
        assert huggingface_hub.snapshot_download is original
