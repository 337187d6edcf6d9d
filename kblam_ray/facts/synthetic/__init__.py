"""Synthetic facts: offline from templates (`SyntheticFacts`), or asked of a chat model (`recipe`)."""

from kblam_ray.facts.synthetic.generator import MAX_FACTS, SyntheticFacts
from kblam_ray.facts.synthetic.kinds import KINDS, Kind
from kblam_ray.facts.synthetic.properties import PROPERTY_TYPES, PropertyType

__all__ = ["KINDS", "MAX_FACTS", "PROPERTY_TYPES", "Kind", "PropertyType", "SyntheticFacts"]
