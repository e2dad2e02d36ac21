"""ECAPA-TDNN and DINO-ECAPA-TDNN as s3prl / SUPERB upstreams that expose per-block hidden states.

After ``pip install`` nothing needs to be imported: every process that imports ``s3prl.hub`` finds the entries there
(see :mod:`s3prl_speaker_upstreams._startup`). Where start-up files are not run (``python -S``, zip applications) or are
switched off, call :func:`register`.

This module imports nothing, because Python's start-up file imports it in every process.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "load_encoder", "register"]


def register() -> list[str]:
    """Make s3prl importable on current packages and put our entries into ``s3prl.hub``, explicitly.

    Does at once what the start-up file does on demand; calling it again changes nothing.

    Returns
    -------
    list of str
        Names of all our entries that ``s3prl.hub`` now has.

    Raises
    ------
    ModuleNotFoundError
        If s3prl itself is not installed.

    >>> import s3prl_speaker_upstreams
    >>> "ecapa_tdnn_local" in s3prl_speaker_upstreams.register()  # doctest: +SKIP
    True
    """
    from s3prl_speaker_upstreams import compat, registration

    compat.install()
    from s3prl import hub

    return registration.register_into(hub)


def __getattr__(name: str):
    if name == "load_encoder":  # lazily, since it imports torch
        from s3prl_speaker_upstreams.checkpoints import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
