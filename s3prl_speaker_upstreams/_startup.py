"""Runs in every Python process (through ``s3prl_speaker_upstreams.pth``) and waits for ``import s3prl``.

s3prl looks upstreams up with ``getattr(s3prl.hub, name)`` and offers no plugin hook, so nothing but a start-up file can
make ``python run_downstream.py -u ecapa_dino`` work unchanged in every process: the main one, DataLoader workers,
torchrun ranks, joblib children. This module therefore

* imports only ``os`` and ``sys``, which every interpreter has loaded already (cost well below a millisecond);
* puts one finder in front of ``sys.meta_path``, which finds nothing but sees that ``s3prl`` is about to be imported;
* then calls :func:`s3prl_speaker_upstreams.compat.install`, and has
  :func:`s3prl_speaker_upstreams.registration.register_into` called as soon as the body of ``s3prl.hub`` has run.

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


def _after_hub(hub):
    try:
        from s3prl_speaker_upstreams import registration

        registration.register_into(hub)
    except ImportError as error:
        if not _half_removed(error):
            raise


def _before_s3prl():
    try:
        from s3prl_speaker_upstreams import compat
        from s3prl_speaker_upstreams.compat import _hooks

        compat.install()
        _hooks.watch(("s3prl.hub",), _after_hub)
    except ImportError as error:
        if not _half_removed(error):
            raise


def _begins_s3prl(name):
    """True if the import of ``name`` is s3prl's first, or what s3prl's script imports before it."""
    if name == "s3prl":
        return True
    script = (getattr(sys, "argv", None) or [""])[0]
    return name == "torchaudio" and os.path.basename(script) == "run_downstream.py"


class S3prlFinder:
    """First entry of ``sys.meta_path``: finds nothing, but is asked when s3prl is about to be imported."""

    _asked = False

    def find_spec(self, fullname, path=None, target=None):
        if self._asked or not _begins_s3prl(fullname):
            return None
        self._asked = True
        _before_s3prl()
        # finders that were put in front of this one meanwhile are not asked about this import any more
        hooks = sys.modules.get(_PACKAGE + ".compat._hooks")
        return None if hooks is None else hooks.FINDER.find_spec(fullname, path, target)


def active():
    """True if the finder is in place in this process."""
    return any(isinstance(finder, S3prlFinder) for finder in sys.meta_path)


def install():
    """Put the finder in place, once, unless switched off."""
    if not switched_off() and not active():
        sys.meta_path.insert(0, S3prlFinder())


install()
