"""Answers grounded in facts: cited, or read and checked so that every value stated is a fact's text."""

from kblam_ray.model.grounding.grounder import Grounded, Grounder, ground
from kblam_ray.model.grounding.reading import reading_message

GROUNDINGS = ("off", "cite", "verbatim")
"""How an answer is grounded: not at all; with the facts it attended to; with facts that it was read and checked by."""

__all__ = ["GROUNDINGS", "Grounded", "Grounder", "ground", "reading_message"]
