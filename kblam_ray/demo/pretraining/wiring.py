"""Start a model that finds and copies, in closed form: what a short training would look for in vain.

Two things that the demo's model must do are known beforehand, so that its weights need not be found by chance:

- to find: the key embedding of the fact that a question asks for is, to a good part, a sum over the question's tokens.
  A ridge regression from bags of tokens to keys gives each token its vector; as embeddings, with heads that attend to
  all tokens alike, they make every state a guess at the key asked for.
- to copy: to go on with "Guinea-Bi" as it stood above, a head of layer 0 tells each token which one came before it, and
  a head of layer 1 looks where the present token came before, and says what stood there. Neither is of use without the
  other, so that chance finds them late: 1,800 steps did not.

The numbers of a hidden state are laid out for it: `meaning` of the token and of the text so far, a random `name` by
which tokens are told apart (MiniLM does not tell `us` from `US`), the name of the token `before`, and one number that
is the same for all tokens, so long that the layers' norms leave the others' proportions alone. All of it is trained on
like any other weight.

Shape legend: V vocabulary, X hidden size, D head dim, P encoder dim, Q questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

MEANING_SHARE, NAME_SHARE = 7 / 12, 1 / 4
"""Parts of the hidden size."""

RIDGE = 3.0
SAME_LENGTH = 3.0
"""Of the number that all tokens share, beside about 1 for a token's meaning and 1 for its name."""

FASTEST = 6
"""Rotary frequencies that tell neighbours apart."""

SLOWEST_RADIANS = 0.02
"""Rotary frequencies so slow that they hardly turn within a prompt carry what a token is."""

SHARPNESS = 60.0
"""Logit of the token before; those beside it get about four fifths of it."""

MATCH = 30.0
"""Logit of a place that fits."""

GAIN = 4.0
"""Of the mean meaning of the text so far: of twenty tokens few say what is asked."""

SAID = 6.0
"""Length of what the copying head says, in names."""


@dataclass(frozen=True)
class TokenMeanings:
    """Vectors whose sum over a question's tokens lies near the key asked for.

    Attributes:
        tokens_VX: float32 [V, meaning], of mean length 1 over the tokens that were met.
        keys_PX: float32 [P, meaning]: maps a key, less the keys' mean, to where it is to be found.
    """

    tokens_VX: torch.Tensor
    keys_PX: torch.Tensor


def token_meanings(
    batches: Iterator[tuple[list[list[int]], np.ndarray]], vocabulary: int, dim_keys: int, meaning: int
) -> TokenMeanings:
    """Regress keys on bags of tokens, and keep the directions that tell keys apart best.

    Args:
        batches: token ids of questions, and the keys they ask for less the keys' mean, float32 [Q, P].
        vocabulary: V.
        dim_keys: P.
        meaning: numbers kept.
    """
    gram = np.zeros((vocabulary + 1, vocabulary + 1))
    cross, square, num = np.zeros((vocabulary + 1, dim_keys)), np.zeros((dim_keys, dim_keys)), 0
    for ids, keys_QP in batches:
        bags = np.zeros((len(ids), vocabulary + 1))
        bags[:, -1] = 1
        for row, tokens in enumerate(ids):
            np.add.at(bags[row], tokens, 1)
        gram += bags.T @ bags
        cross += bags.T @ keys_QP
        square += keys_QP.T @ keys_QP
        num += len(ids)
    weights = np.linalg.solve(gram + RIDGE * np.eye(vocabulary + 1), cross)
    explained = weights.T @ gram @ weights / num
    rest = (square - weights.T @ cross - cross.T @ weights) / num + explained
    # Where the rest is small a guess is worth much: whiten by it, then keep what varies most.
    values, vectors = np.linalg.eigh(rest + np.trace(rest) / dim_keys * np.eye(dim_keys))
    whiten = vectors / np.sqrt(values) @ vectors.T
    values, vectors = np.linalg.eigh(whiten @ explained @ whiten)
    keys_PX = whiten @ vectors[:, ::-1][:, :meaning]
    tokens_VX = weights[:-1] @ keys_PX
    lengths = np.linalg.norm(tokens_VX, axis=1)
    tokens_VX /= lengths[lengths > 0].mean()
    return TokenMeanings(torch.from_numpy(tokens_VX).float(), torch.from_numpy(keys_PX).float())


@torch.no_grad()
def wire(model: LlamaForCausalLM, head: nn.Linear, meanings: TokenMeanings) -> None:
    """Set embeddings, the heads of layers 0 and 1 that find and copy, and the head that says what is asked.

    Args:
        model: untrained, with as many key/value heads as query heads.
        head: hidden states to the encoder's space; its scale is chosen by the training.
    """
    at = _Layout(model)
    generator = torch.Generator().manual_seed(0)
    embeddings_VX = model.model.embed_tokens.weight
    num_name = at.name.stop - at.name.start
    embeddings_VX.zero_()
    embeddings_VX[:, at.meaning] = meanings.tokens_VX
    embeddings_VX[:, at.name] = torch.randn(len(embeddings_VX), num_name, generator=generator) / num_name**0.5
    embeddings_VX[:, -1] = SAME_LENGTH
    for layer in model.model.layers:
        # What is not wired says nothing yet: noise would drown the little that a mean over many tokens is.
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    at.find()
    at.copy()
    head.weight.zero_()
    head.bias.zero_()
    head.weight[:, at.meaning] = meanings.keys_PX


class _Layout:
    """Which numbers of a hidden state and which heads of a model are for what."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config: Any = model.config
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.width = hidden // self.heads
        self.meaning = slice(0, int(hidden * MEANING_SHARE))
        self.name = slice(self.meaning.stop, self.meaning.stop + int(hidden * NAME_SHARE))
        self.angles = config.rope_parameters["rope_theta"] ** (-2 * torch.arange(self.width // 2) / self.width)
        slow = (self.angles < SLOWEST_RADIANS).nonzero().squeeze(1)
        room = hidden - 1 - self.name.stop
        self.slow_D = torch.cat([slow, slow + self.width // 2])
        self.before = slice(self.name.stop, self.name.stop + min(len(self.slow_D), room))
        # What the norm makes of a number of a typical token.
        self.scale = hidden**0.5 / (SAME_LENGTH**2 + 2) ** 0.5
        self.first, self.second = (model.model.layers[number].self_attn for number in (0, 1))

    def find(self) -> None:
        """Layer 0, first heads: the mean meaning of all tokens so far is added to each one's."""
        for number, start in enumerate(range(0, self.meaning.stop, self.width)):
            some = slice(start, min(start + self.width, self.meaning.stop))
            rows = slice(number * self.width, number * self.width + some.stop - some.start)
            # All tokens alike: queries and keys of 0.
            self._clear(self.first, number)
            self.first.v_proj.weight[rows, some] = torch.eye(some.stop - some.start)
            self.first.o_proj.weight[some, rows] = GAIN / self.scale * torch.eye(some.stop - some.start)

    def copy(self) -> None:
        """Last heads: a token looks for where it stood before, and says what came after it."""
        self._tell(self.heads - 1, self.before)
        self._look_up(self.heads - 1, self.name, self.before)

    def _tell(self, head: int, place: slice) -> None:
        """Layer 0: each token gets the name of the one before it."""
        self._clear(self.first, head)
        start = head * self.width
        # A query and a key that are the same for all tokens: their logit depends on their distance alone.
        amplitude = (SHARPNESS * self.width**0.5 / FASTEST) ** 0.5 / (SAME_LENGTH * self.scale)
        for number, angle in enumerate(self.angles[:FASTEST]):
            self.first.k_proj.weight[start + number, -1] = amplitude
            self.first.q_proj.weight[start + number, -1] = amplitude * torch.cos(angle)
            self.first.q_proj.weight[start + number + self.width // 2, -1] = -amplitude * torch.sin(angle)
        carried = torch.arange(place.stop - place.start)
        self.first.v_proj.weight[start + carried, self.name.start + carried] = 1 / self.scale
        self.first.o_proj.weight[place.start + carried, start + carried] = 1.0

    def _look_up(self, head: int, wanted: slice, place: slice) -> None:
        """Layer 1: each token looks for those whose `place` holds what its `wanted` holds, and says their names."""
        self._clear(self.second, head)
        start = head * self.width
        compared = torch.arange(min(wanted.stop - wanted.start, place.stop - place.start))
        num_name = self.name.stop - self.name.start
        amplitude = (MATCH * self.width**0.5 * num_name / len(compared)) ** 0.5 / self.scale
        rows = start + self.slow_D[: len(compared)]
        self.second.k_proj.weight[rows, place.start + compared] = amplitude
        self.second.q_proj.weight[rows, wanted.start + compared] = amplitude
        said = torch.arange(min(self.width, num_name))
        self.second.v_proj.weight[start + said, self.name.start + said] = 1 / self.scale
        self.second.o_proj.weight[self.name.start + said, start + said] = SAID

    def _clear(self, attention: Any, head: int) -> None:
        rows = slice(head * self.width, (head + 1) * self.width)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0
        attention.o_proj.weight[:, rows] = 0
