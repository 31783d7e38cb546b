"""oneday: train a language model from scratch on one GPU in one day."""

__version__ = "0.1.0"
