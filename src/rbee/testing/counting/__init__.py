"""A worker that needs no model: it counts, so that the one right text of every answer is known.

Everything of it but the engine is the real worker. What it is asked in the prompt, and what is written next to its
model file, make it misbehave: see `Count` and `Behaviour`.
"""

from rbee.testing.counting.behaviour import Behaviour, behave, loads_of
from rbee.testing.counting.count import Act, Count, Piece, answer_of, pieces
from rbee.testing.counting.programs import write_model, write_programs

__all__ = [
    "Act",
    "Behaviour",
    "Count",
    "Piece",
    "answer_of",
    "behave",
    "loads_of",
    "pieces",
    "write_model",
    "write_programs",
]
