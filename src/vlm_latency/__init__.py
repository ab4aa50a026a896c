"""Where the time of a vision-language model's request goes, and what predicts it."""

__version__ = "0.1.0"
