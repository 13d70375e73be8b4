"""Helpers for the processes that the tools start."""

import ctypes
import signal
import sys


def end_with_parent():
    """Let the kernel end this child process if the parent dies without ending it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
