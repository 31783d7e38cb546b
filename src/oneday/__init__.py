"""oneday: train a language model from scratch on one GPU in one day."""

import logging

__version__ = "0.1.0"

# transformers imports bitsandbytes, which warns of an optional 4-bit kernel on machines without a GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
