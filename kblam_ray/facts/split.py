"""Split facts by entity, so that what is held out for evaluation is about nobody that training has met."""

from __future__ import annotations

from kblam_ray.facts.synthetic.draws import Draws, number_of


def is_held_out(entity: str, fraction: float = 0.1, seed: int = 0) -> bool:
    """Whether `entity` belongs to the held-out share of any table: the same answer in every process and every table.

    Letter case does not count. (`SyntheticFacts.is_held_out` keeps near-duplicates together as well.)

    Args:
        fraction: the share of entities held out, 0 to 1.
        seed: another seed makes another split.
    """
    return Draws(seed, number_of(entity.casefold())).below(1 << 32) < fraction * (1 << 32)
