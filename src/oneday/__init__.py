"""oneday: train a language model from scratch on one GPU in one day."""

import logging
import os
import sys

__version__ = "0.1.0"

# Python puts a program's own directory before all others: there scripts/evaluate.py would hide the library `evaluate`.
if sys.path and os.path.isfile(os.path.join(sys.path[0], "evaluate.py")):
    sys.path.pop(0)

# transformers imports bitsandbytes, which warns of an optional 4-bit kernel on machines without a GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
