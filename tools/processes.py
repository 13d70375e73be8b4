"""What the processes that the tools start have in common."""

import ctypes
import signal
import sys


def end_with_parent():
    """In the child: be ended by the kernel if the parent dies without ending it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
