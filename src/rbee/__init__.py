"""Run language models on the computers you own, and hear from each of them what it does for you."""

__version__ = "0.1.0"
