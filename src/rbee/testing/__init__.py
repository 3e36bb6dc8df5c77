"""For tests of rbee and of what is built on it: a stack of the real programs, and a pytest plugin."""

from rbee.testing.stack import Finished, LocalStack, Running

__all__ = ["Finished", "LocalStack", "Running"]
