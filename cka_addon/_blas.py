"""Symmetric product X X' on the CPU through the BLAS that scipy ships, callable from several threads at once.

torch has no symmetric product and scipy's own wrapper holds Python's lock while it runs, so that threads cannot work on
different layers side by side. `scipy.linalg.cython_blas` publishes the same routine as a C function for other packages;
calling that through ctypes releases the lock. Where anything about it looks different, `available()` is False and
the caller uses torch's general product on tiles instead.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

_SUFFIX = {np.dtype(np.float32): ("ssyrk", ctypes.c_float), np.dtype(np.float64): ("dsyrk", ctypes.c_double)}


@functools.cache
def _routine(name: str) -> Callable | None:
    """The C function `name` of scipy's BLAS, or None where its signature is not the one expected."""
    try:
        from scipy.linalg import cython_blas
    except ImportError:
        return None
    capsule = getattr(cython_blas, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return None
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = get_name(capsule)
    if signature.count(b"char *") != 2 or signature.count(b" int *") != 4 or signature.count(b"*") != 10:
        return None
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 2, *[ctypes.c_void_p] * 8)
    return prototype(get_pointer(capsule, signature))


@functools.cache
def available() -> bool:
    """True when the routine is there and right: it is tried on a small product first."""
    if _routine("ssyrk") is None or _routine("dsyrk") is None:
        return False
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    out = np.zeros((3, 3), np.float32)
    syrk_lower(x, out)
    return bool(np.array_equal(out, np.tril(x @ x.T)))


def syrk_lower(x: np.ndarray, out: np.ndarray) -> None:
    """Write the lower triangle of x x' into `out`; what lies above the diagonal is left as it was.

    x : (n, d), C-contiguous, float32 or float64.  out : (n, n), C-contiguous, same type.
    """
    n, d = x.shape
    if out.shape != (n, n) or out.dtype != x.dtype or not (x.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError(f"got x {x.shape} {x.dtype}, out {out.shape} {out.dtype}; expected contiguous (n, d), (n, n)")
    name, scalar = _SUFFIX[x.dtype]
    size, width, one, zero = ctypes.c_int(n), ctypes.c_int(d), scalar(1), scalar(0)
    at = ctypes.addressof
    # A C-ordered (n, d) array is Fortran's (d, n): 'T' makes it x x', and Fortran's upper triangle is C's lower one.
    routine = _routine(name)
    if routine is None:
        raise RuntimeError(f"scipy's BLAS has no {name} that can be called; ask available() first")
    routine(b"U", b"T", at(size), at(width), at(one), x.ctypes.data, at(width), at(zero), out.ctypes.data, at(size))


def single_threaded() -> AbstractContextManager | None:
    """A context in which one BLAS call uses one thread, or None where that cannot be had (threadpoolctl is missing)."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    return threadpool_limits(1, user_api="blas")


def in_one_thread() -> AbstractContextManager:
    """`single_threaded`, or a context that does nothing."""
    return single_threaded() or nullcontext()
