"""The command as a child that ends with its parent, however that ends."""

import ctypes
import signal
import sys

from openinteractions.cli.main import main

_PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
main()
