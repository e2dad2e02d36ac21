"""Runs in every Python process (through ``s3prl_speaker_upstreams.pth``) and waits for ``import s3prl``.

s3prl looks upstreams up with ``getattr(s3prl.hub, name)`` and offers no plugin hook, so nothing but a start-up file can
make ``python run_downstream.py -u ecapa_dino`` work unchanged in every process: the main one, DataLoader workers,
torchrun ranks, joblib children. This module therefore

* imports only ``os`` and ``sys``, which every interpreter has loaded already (cost well below a millisecond);
* puts one finder in front of ``sys.meta_path`` that answers ``None`` for all names but two;
* just before the body of ``s3prl`` runs, calls :func:`s3prl_speaker_upstreams.compat.install`;
* just after the body of ``s3prl.hub`` ran, calls :func:`s3prl_speaker_upstreams.registration.register_into`.

``S3PRL_SPEAKER_UPSTREAMS=0`` in the environment switches all of it off. A package that is half removed (modules
missing) leaves s3prl as it is, without a word: Python itself must start whatever state site-packages is in.
"""

import os
import sys

SWITCH = "S3PRL_SPEAKER_UPSTREAMS"
_PACKAGE = __name__.rpartition(".")[0]


def switched_off():
    """True where the environment variable ``S3PRL_SPEAKER_UPSTREAMS`` says 0, off, no or false."""
    return os.environ.get(SWITCH, "1").strip().lower() in {"0", "off", "no", "false"}


def _half_removed(error):
    """True if ``error`` says that a module of this very package is not there."""
    return (error.name or "").partition(".")[0] == _PACKAGE


def _before_s3prl():
    try:
        from s3prl_speaker_upstreams import compat

        compat.install()
    except ImportError as error:
        if not _half_removed(error):
            raise


def _after_hub(hub):
    try:
        from s3prl_speaker_upstreams import registration

        registration.register_into(hub)
    except ImportError as error:
        if not _half_removed(error):
            raise


class _ThenRegister:
    """Loader that runs the real loader of ``s3prl.hub``, puts it back in its place, and registers our entries."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _after_hub(module)


class HubFinder:
    """First entry of ``sys.meta_path``; see the module's docstring."""

    def __init__(self):
        self._compat_asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "s3prl":
            if not self._compat_asked:
                self._compat_asked = True
                _before_s3prl()
            return None
        if fullname != "s3prl.hub":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


def active():
    """True if the finder is in place in this process."""
    return any(type(finder).__name__ == "HubFinder" and hasattr(finder, "_compat_asked") for finder in sys.meta_path)


def install():
    """Put the finder in place, once, unless switched off or s3prl.hub is there already (then :func:`register`)."""
    if not switched_off() and not active():
        sys.meta_path.insert(0, HubFinder())


install()
