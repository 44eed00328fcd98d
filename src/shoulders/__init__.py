"""Neural middleware for frozen language models (arXiv 2204.10019)."""

__version__ = "0.1.0"
