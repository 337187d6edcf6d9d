"""Sufficient statistics of ridge regressions: sums of products that add up exactly, whoever made them.

Shape legend: X hidden size, P encoder dim, N query heads, V numbers in a layer's value vectors (key/value heads x H).

A row of hidden states has a 1 appended, so that its products hold sums and counts as well. All in float64. The size
does not depend on how many questions were looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from kblam_ray.errors import InputError

ROWS_PER_STEP = 65_536
"""Keys made float64 at a time."""


@dataclass
class Sums:
    """Named float64 tensors that add up.

    Attributes:
        tensors: by name.
    """

    tensors: dict[tuple, torch.Tensor] = field(default_factory=dict)

    def add(self, name: tuple, product: torch.Tensor) -> None:
        """Add a float64 tensor to the sum of that name."""
        known = self.tensors.get(name)
        self.tensors[name] = product if known is None else known.add_(product)

    def add_product(self, name: tuple, left_nA: torch.Tensor, right_nB: torch.Tensor) -> None:
        """Add `left^T right`, [A, B], of float64 rows."""
        self.add(name, left_nA.T @ right_nB)


class Statistics:
    """What the regressions need of all questions seen; `a + b` is what one pass over both would have given.

    Sums by name: `("hidden", layer, part)` [X+1, X+1], `("keys", layer, part)` [X+1, P], `("log_sum_exp", layer,
    part)` [X+1, N], `("key_square", part)` [P+1, P+1], `("value_square",)` [P+1, P+1], `("values", layer)` [P+1, V]
    and `("first_values", layer)` [P+1, V].

    Attributes:
        num_questions: questions looked at.
        num_unreadable: of them, those whose answer the tokenizer does not give back.
        num_tokens: tokens of them, without padding.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.num_questions = self.num_unreadable = self.num_tokens = 0

    def __add__(self, other: Statistics) -> Statistics:
        total = Statistics()
        for part in (self, other):
            for name, tensor in part.sums.tensors.items():
                known = total.sums.tensors.get(name)
                if known is not None and known.shape != tensor.shape:
                    raise InputError(
                        f"statistics {name} of {list(known.shape)} and of {list(tensor.shape)} numbers",
                        where="Statistics",
                        help="add those of one base model and one encoder",
                    )
                total.sums.tensors[name] = tensor.cpu().clone() if known is None else known + tensor.cpu()
            total.num_questions += part.num_questions
            total.num_unreadable += part.num_unreadable
            total.num_tokens += part.num_tokens
        return total

    def cpu(self) -> Statistics:
        """The same with its sums in the host's memory, for sending."""
        return self + Statistics()

    def get(self, *name: object) -> torch.Tensor | None:
        """A sum by its name; None where nothing was added to it."""
        return self.sums.tensors.get(name)

    def count(self, part: int) -> int:
        """Tokens of a part that want a key."""
        square = self.get("key_square", part)
        return 0 if square is None else round(square[-1, -1].item())

    @property
    def num_values(self) -> int:
        """Values stated in the answers seen."""
        square = self.get("value_square")
        return 0 if square is None else round(square[-1, -1].item())

    def weighted(self, kind: str, layer: int | None, weights: Mapping[int, float]) -> torch.Tensor:
        """The sum over parts of `weight x statistic`.

        Args:
            kind: "hidden", "keys", "log_sum_exp" or "key_square", the latter without a layer.
            weights: by part; parts of which nothing was seen count for nothing.

        Raises:
            InputError: nothing was seen of any of the parts.
        """
        total: torch.Tensor | None = None
        for part, weight in weights.items():
            found = self.get(kind, part) if layer is None else self.get(kind, layer, part)
            if found is not None and weight:
                total = found * weight if total is None else total.add_(found, alpha=weight)
        if total is None:
            raise InputError(
                "the questions have no token that wants a fact",
                where="closed-form fit",
                help="give more questions, or a mix with answerable ones",
            )
        return total


def mean_and_covariance(rows_MP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all rows, float64 [P] and [P, P]; a part of them is in float64 at a time."""
    parts = range(0, len(rows_MP), ROWS_PER_STEP)
    mean_P = sum(rows_MP[start : start + ROWS_PER_STEP].sum(0, dtype=np.float64) for start in parts) / len(rows_MP)
    covariance_PP = np.zeros((rows_MP.shape[1], rows_MP.shape[1]))
    for start in parts:
        centred_mP = rows_MP[start : start + ROWS_PER_STEP].astype(np.float64) - mean_P
        covariance_PP += centred_mP.T @ centred_mP
    return mean_P, covariance_PP / len(rows_MP)


def with_one(rows_nX: torch.Tensor) -> torch.Tensor:
    """Rows as float64 with a 1 appended: [n, X+1]."""
    rows_nX = rows_nX.double()
    return torch.cat([rows_nX, rows_nX.new_ones(len(rows_nX), 1)], 1)
