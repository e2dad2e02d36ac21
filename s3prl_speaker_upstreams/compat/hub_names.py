"""huggingface_hub names that s3prl imports but current versions (1.0 and later) no longer have.

They exist so that ``import`` succeeds; training and evaluation with ``--hub torch`` never use them. What can be
supplied truthfully is (the stored token); password log-in and git-based upload are gone from the Hub itself, so they
raise and say what to do instead.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from s3prl_speaker_upstreams.compat._errors import RemovedApi

__all__ = ["HfFolder", "Repository", "login", "make_runner_api", "snapshot_download", "wrap_get_upstream"]


def _stored_token() -> str | None:
    import huggingface_hub

    return huggingface_hub.get_token()


class HfFolder:
    """Stands for ``huggingface_hub.HfFolder`` (gone in 1.0): reads the stored token, never writes one."""

    @staticmethod
    def get_token() -> str | None:
        return _stored_token()

    @staticmethod
    def save_token(token: str | None) -> None:
        """Does nothing for the token that is stored already; raises RemovedApi for any other."""
        if token is None or token != _stored_token():
            raise RemovedApi(
                "HfFolder.save_token: got a token that is not the stored one; huggingface_hub 1.0 removed HfFolder; "
                "log in once with `hf auth login` (or set HF_TOKEN) instead"
            )

    @staticmethod
    def delete_token() -> NoReturn:
        raise RemovedApi("HfFolder.delete_token: huggingface_hub 1.0 removed HfFolder; use `hf auth logout`")


class Repository:
    """Stands for ``huggingface_hub.Repository`` (gone in 1.0): raises when it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        folder = kwargs.get("local_dir", args[0] if args else "the experiment's folder")
        raise RemovedApi(
            f"Repository({folder!r}): huggingface_hub 1.0 removed the git-based Repository, so --push_to_hf_hub "
            "cannot push; training is finished and its files are complete: push them with `hf upload REPO EXPDIR`"
        )


def login(self: Any, username: str | None = None, password: str | None = None) -> str:
    """``HfApi.login(username, password)``: the Hub takes no passwords any more, so the stored token is given back.

    Raises RemovedApi if none is stored.
    """
    token = _stored_token()
    if token is None:
        raise RemovedApi(
            f"HfApi.login: got user {username!r} and no stored token; the Hugging Face Hub no longer takes passwords; "
            "run `hf auth login` or set HF_TOKEN, then start again"
        )
    return token


def snapshot_download(repo_id: str, revision: str | None = None, use_auth_token: Any = None, **kwargs: Any) -> str:
    """huggingface_hub's own ``snapshot_download``, also with ``revision`` by position and ``use_auth_token``."""
    from huggingface_hub import _snapshot_download

    if use_auth_token is True and _stored_token() is None:
        use_auth_token = None  # as before: a public repository needs no token
    if use_auth_token is not None:
        kwargs.setdefault("token", use_auth_token)
    return _snapshot_download.snapshot_download(repo_id, revision=revision, **kwargs)


def wrap_get_upstream(runner: Any) -> None:
    """``Runner._get_upstream`` imports ``snapshot_download`` by itself: give it ours, for that call only."""
    original = runner._get_upstream

    @functools.wraps(original)
    def _get_upstream(self: Any) -> Any:
        import huggingface_hub as hub

        huggingface_hub: Any = hub
        if not getattr(self.args, "from_hf_hub", False):
            return original(self)
        before = huggingface_hub.snapshot_download
        huggingface_hub.snapshot_download = snapshot_download
        try:
            return original(self)
        finally:
            huggingface_hub.snapshot_download = before

    runner._get_upstream = _get_upstream


def make_runner_api(base: Any) -> type:
    """A subclass of ``HfApi`` whose ``create_repo`` also takes the old ``name`` and ``organization``."""

    class RunnerHfApi(base):
        def create_repo(self, repo_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
            name, organization = kwargs.pop("name", None), kwargs.pop("organization", None)
            if name is not None:
                repo_id = f"{organization}/{name}" if organization else name
            return super().create_repo(repo_id, *args, **kwargs)

    RunnerHfApi.__name__ = RunnerHfApi.__qualname__ = "HfApi"
    return RunnerHfApi
