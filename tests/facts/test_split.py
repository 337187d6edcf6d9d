"""The split by entity: stable, of the share asked for, blind to letter case."""

from __future__ import annotations

from kblam_ray.facts.split import is_held_out
from kblam_ray.facts.synthetic import SyntheticFacts


def test_the_split_is_stable_and_has_its_share() -> None:
    maker = SyntheticFacts(1)
    names = [maker.entity_name(number) for number in range(4_000)]
    sides = [is_held_out(name, 0.2) for name in names]
    assert 0.17 < sum(sides) / len(sides) < 0.23
    assert [is_held_out("Chad", seed=seed) for seed in range(12)] == [is_held_out("CHAD", seed=s) for s in range(12)]
    assert len({is_held_out("Chad", 0.5, seed) for seed in range(20)}) == 2
    assert not any(is_held_out(name, 0) for name in names)
    assert all(is_held_out(name, 1) for name in names)
