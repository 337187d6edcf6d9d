"""Training batches: examples as tensors on the device that trains, and the stream of a worker's share of them.

The order is fixed by the examples' numbers: step s of any number of workers is the examples s * G to (s + 1) * G - 1,
G the batch size. A stream begins at any step, so that a resumed training replays nothing.

Shape legend: B batch, T tokens, M facts, P encoder dim, W pairs of a token and a right fact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import InputError
from kblam_ray.training.mix.examples import TEXT, Example, ExampleMaker
from kblam_ray.training.mix.proportions import Share
from kblam_ray.training.mix.streaming import dataset, stream_examples

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["Share", "TrainingBatch", "batches", "dataset", "stream_batches"]


@dataclass(frozen=True)
class TrainingBatch:
    """Some examples of one step as tensors, padded behind.

    Attributes:
        numbers: of the examples.
        kinds: of the examples.
        input_ids_BT: int64.
        attention_mask_BT: int64, 0 for padding.
        labels_BT: int64, the answers' tokens where they stand; -100 where there is no loss.
        answer_start_B: int64.
        is_text_B, is_unanswerable_B: bool.
        keys_MP, values_MP: for each knowledge base its facts' base embeddings; one for all rows where they share it.
        wanted_row_W, wanted_at_W, wanted_place_W: int64, the row, the position and the place in the row's knowledge
            base of each pair of a token and a fact that it shall attend to; ordered by row.
        wanted_part_W: float64, the part of the token's attention that the fact shall have: an even one.
    """

    numbers: tuple[int, ...]
    kinds: tuple[str, ...]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    answer_start_B: torch.Tensor
    is_text_B: torch.Tensor
    is_unanswerable_B: torch.Tensor
    keys_MP: tuple[torch.Tensor, ...]
    values_MP: tuple[torch.Tensor, ...]
    wanted_row_W: torch.Tensor
    wanted_at_W: torch.Tensor
    wanted_place_W: torch.Tensor
    wanted_part_W: torch.Tensor

    @classmethod
    def collate(
        cls,
        examples: Sequence[Example],
        maker: ExampleMaker,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> TrainingBatch:
        """Put examples together.

        Args:
            examples: of one step; all share a knowledge base where the settings say so.
            maker: which has the embeddings.
            device: where the tensors go.
            dtype: of the embeddings; None keeps float16.
        """
        if maker.facts is None:
            raise InputError(
                "a copy of an example maker from another process has no embeddings",
                where="collate",
                help="collate where the maker was made",
            )
        lengths = [len(example.input_ids) for example in examples]
        shape = len(examples), max(lengths)
        tokenizer = maker.chat.tokenizer
        # Any token does: padding stands behind everything that counts, and nothing looks ahead.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids_BT, labels_BT = np.full(shape, pad, np.int64), np.full(shape, -100, np.int64)
        for row, example in enumerate(examples):
            ids_BT[row, : lengths[row]] = example.input_ids
            labels_BT[row, : lengths[row]] = example.labels
        bases = examples[:1] if maker.settings.kb_per == "batch" else examples
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for example in bases:
            for parts, table_MP in ((keys, maker.facts.keys_MP), (values, maker.facts.values_MP)):
                parts.append(torch.from_numpy(table_MP[example.kb_rows]).to(device, dtype))
        wanted_row_W = np.repeat(np.arange(len(examples)), [len(example.wanted_at) for example in examples])
        wanted_at_W = np.concatenate([example.wanted_at for example in examples]).astype(np.int64)
        token_W = wanted_row_W * shape[1] + wanted_at_W
        _, token_of_W, num_right = np.unique(token_W, return_inverse=True, return_counts=True)

        def tensor(numbers: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)

        return cls(
            numbers=tuple(example.number for example in examples),
            kinds=tuple(example.kind for example in examples),
            input_ids_BT=tensor(ids_BT),
            attention_mask_BT=tensor((np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)),
            labels_BT=tensor(labels_BT),
            answer_start_B=tensor(np.array([example.answer_start for example in examples], np.int64)),
            is_text_B=tensor(np.array([example.kind == TEXT for example in examples])),
            is_unanswerable_B=tensor(np.array([example.kind == "unanswerable" for example in examples])),
            keys_MP=tuple(keys),
            values_MP=tuple(values),
            wanted_row_W=tensor(wanted_row_W.astype(np.int64)),
            wanted_at_W=tensor(wanted_at_W),
            wanted_place_W=tensor(np.concatenate([example.wanted_places for example in examples]).astype(np.int64)),
            wanted_part_W=tensor(1.0 / num_right[token_of_W]),
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def is_shared(self) -> bool:
        """Whether all rows have one knowledge base."""
        return len(self.keys_MP) == 1

    def knowledge(self, adapter: KnowledgeAdapter) -> KnowledgeMemory | list[KnowledgeMemory]:
        """What the rows attend to: one memory where they share it, else one for each row."""
        memories = [
            KnowledgeMemory.from_embeddings(adapter, keys_MP, values_MP, device=keys_MP.device)
            for keys_MP, values_MP in zip(self.keys_MP, self.values_MP, strict=True)
        ]
        return memories[0] if self.is_shared else memories

    @property
    def num_facts_B(self) -> list[int]:
        """M of each row's knowledge base."""
        sizes = [len(keys_MP) for keys_MP in self.keys_MP]
        return sizes * len(self) if self.is_shared else sizes

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on another device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
            elif name in ("keys_MP", "values_MP"):
                moved[name] = tuple(part.to(device) for part in value)
            else:
                moved[name] = value
        return TrainingBatch(**moved)


def batches(
    maker: ExampleMaker,
    first_step: int,
    last_step: int,
    share: Share | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[list[TrainingBatch]]:
    """The micro-batches of a worker's steps `first_step` to `last_step - 1`, made in this process when asked for.

    `dataset` makes the same examples on Ray's workers.

    Raises:
        InputError: the batch cannot be dealt out evenly, or see `ExampleMaker.example`.
    """
    share = share or Share()
    for step in range(first_step, last_step):
        yield _collated(maker.share(step, share), maker, share, device, dtype)


def stream_batches(
    rows: Dataset,
    maker: ExampleMaker,
    share: Share | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[list[TrainingBatch]]:
    """The micro-batches of a worker's steps out of what `dataset` made for the same share; the same as `batches` gives.

    Args:
        rows: see `dataset`.
        maker: the one the dataset was made with, in the process that trains.
    """
    share = share or Share()
    for examples in stream_examples(rows, maker.settings.batch_size // share.world_size):
        yield _collated(examples, maker, share, device, dtype)


def _collated(
    examples: list[Example],
    maker: ExampleMaker,
    share: Share,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> list[TrainingBatch]:
    size = len(examples) // share.accumulation
    return [
        TrainingBatch.collate(examples[start : start + size], maker, device=device, dtype=dtype)
        for start in range(0, len(examples), size)
    ]
