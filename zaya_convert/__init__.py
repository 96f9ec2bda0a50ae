"""zaya-convert: take a ZAYA1 mixture-of-experts checkpoint to a small, proven model."""

__version__ = "0.2.0"
