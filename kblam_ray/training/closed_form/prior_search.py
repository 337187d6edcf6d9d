"""Which question prior makes attention find the asked facts: its weights, what it reads, and the retrieval layers.

Shape legend: A rows of scores, M facts, G settings tried at once.

The logits of a question at the last prompt token, its cosines and the entities that it names are computed once; every
prior is then added to the logits, which is what the attention does. (A prior also changes what KB layers below hand
on; that is left out, and the calibration asks again with the prior that was found.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kblam_ray.training.closed_form.settings import CalibrationSettings

CONTEXTS = ("last", "last_two")
Setting = tuple[float, float, str]
"""beta, gamma, and the context that the prior reads."""

ALONE: Setting = (0.0, 0.0, CONTEXTS[0])
"""Attention without a prior."""

TOLERANCE = 0.005
"""Shares of questions found that differ by less are taken as equal, and the cross-entropy decides."""


@dataclass(frozen=True)
class PriorScores:
    """What the prior of one question is made of.

    Attributes:
        cosines: by context, float32 [M].
        named: by context, float32 [M], 1 where the question names the fact's entity.
    """

    cosines: Mapping[str, torch.Tensor]
    named: Mapping[str, torch.Tensor]


@dataclass
class _Tally:
    found: float = 0.0
    cross_entropy: float = 0.0
    num: int = 0


@dataclass
class PriorSearch:
    """Sums up, setting by setting and size by size, how well questions find their facts.

    Attributes:
        layer_choices: sets of retrieval layers tried.
    """

    settings: CalibrationSettings
    layer_choices: tuple[tuple[int, ...], ...]
    _tallies: dict[tuple, dict[int, _Tally]] = field(default_factory=dict)

    @classmethod
    def over(cls, settings: CalibrationSettings, layers: Sequence[int]) -> PriorSearch:
        """Each KB layer alone, and all of them."""
        choices: list[tuple[int, ...]] = [(layer,) for layer in layers]
        if len(layers) > 1:
            choices.append(tuple(layers))
        return cls(settings, tuple(choices))

    def add(
        self, size: int, logits: Mapping[int, torch.Tensor], wanted: Sequence[int], prior: PriorScores | None
    ) -> None:
        """Count one question.

        Args:
            size: of the knowledge base.
            logits: by KB layer [A, M], without a prior.
            wanted: places of the facts that answer it.
            prior: None: attention alone is looked at.
        """
        plans: list[tuple[Setting, torch.Tensor | None]] = [(ALONE, None)]
        if prior is not None:
            for context in CONTEXTS:
                for gamma in self.settings.gammas:
                    for beta in self.settings.betas:
                        if beta or gamma:
                            prior_M = beta * prior.cosines[context] + gamma * prior.named[context]
                            plans.append(((beta, gamma, context), prior_M))
        # As many settings at a time as keep their scores small.
        num_scores = max(1, max(one.numel() for one in logits.values()))
        step = max(1, 2**22 // num_scores)
        for start in range(0, len(plans), step):
            some = plans[start : start + step]
            first = next(iter(logits.values()))
            zero_M = torch.zeros(first.shape[1], device=first.device)
            priors_GM = torch.stack([zero_M if prior_M is None else prior_M for _, prior_M in some])
            by_layer = {
                layer: torch.softmax(logits_AM[None] + priors_GM[:, None], -1).mean(1)
                for layer, logits_AM in logits.items()
            }
            for layers in self.layer_choices:
                shares_GM = torch.stack([by_layer[layer] for layer in layers]).mean(0)
                wanted_Gw = shares_GM[:, list(wanted)]
                least_G1 = wanted_Gw.amin(1, keepdim=True)
                found_G = (shares_GM >= least_G1).sum(1) <= len(wanted)
                cross_entropy_G = -wanted_Gw.clamp_min(1e-30).log().mean(1)
                figures = zip(some, found_G.tolist(), cross_entropy_G.tolist(), strict=True)
                for (setting, _), found, cross_entropy in figures:
                    tally = self._tallies.setdefault((layers, setting), {}).setdefault(size, _Tally())
                    tally.found += found
                    tally.cross_entropy += cross_entropy
                    tally.num += 1

    def figures(self, layers: tuple[int, ...], setting: Setting) -> dict[int, tuple[float, float]]:
        """By size: the share of questions whose facts are first, and the mean cross-entropy."""
        return {
            size: (tally.found / tally.num, tally.cross_entropy / tally.num)
            for size, tally in sorted(self._tallies[layers, setting].items())
        }

    def best_layers(self) -> tuple[int, ...]:
        """The retrieval layers with which attention alone does best."""
        return self._best([(layers, ALONE) for layers in self.layer_choices])[0]

    def best_prior(self, layers: tuple[int, ...], at_most: float = float("inf")) -> Setting:
        """beta, gamma and the context that do best with these retrieval layers.

        Args:
            at_most: of beta and gamma together.
        """
        keys = [key for key in self._tallies if key[0] == layers and key[1][0] + key[1][1] <= at_most]
        setting: Setting = self._best(keys)[1]
        return setting

    def _best(self, keys: Sequence[tuple]) -> tuple:
        """The key that finds most, mean over the sizes; of about equal ones that with the least cross-entropy."""
        means = {}
        for key in keys:
            figures = list(self.figures(*key).values())
            means[key] = tuple(sum(column) / len(figures) for column in zip(*figures, strict=True))
        most = max(found for found, _ in means.values())
        good = [key for key in keys if means[key][0] >= most - TOLERANCE]
        return min(good, key=lambda key: means[key][1])
