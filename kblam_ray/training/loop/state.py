"""What a checkpoint holds beside the adapter, and how a rank is put back to where it was.

A checkpoint's folder: `adapter/` (whole, loadable by `KnowledgeAdapter.from_pretrained`), `optimizer.safetensors`
(AdamW's moments by parameter name; absent before the first step), `random.safetensors` (the random states of every
rank) and `state.json` (steps done, the run's settings and tables, what was measured so far).

Examples and the learning rate are functions of the step: nothing of them needs saving.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.errors import StorageError

ADAPTER, OPTIMIZER, RANDOM, STATE = "adapter", "optimizer.safetensors", "random.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to go on.

    Attributes:
        config: of the adapter.
        tensors: the adapter's, float32.
        optimizer: see `engines.OptimizerState`; empty before the first step.
        step: optimizer steps done.
        run: the run's settings and tables, see `plan.RunPlan.record`.
        random_states: per rank, see `random_state`.
        notes: what earlier parts of the run found, such as the fit's report; JSON.
    """

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    step: int
    run: dict[str, Any]
    random_states: list[dict[str, torch.Tensor]]
    notes: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Fill a checkpoint's folder.

        Raises:
            StorageError: the disk cannot be written.
            AdapterError: the tensors are not finite.
        """
        KnowledgeAdapter.of_tensors(self.config, self.tensors).save_pretrained(folder / ADAPTER)
        states = {
            f"{rank}.{name}": tensor for rank, state in enumerate(self.random_states) for name, tensor in state.items()
        }
        try:
            if self.optimizer:
                save_file({name: tensor.contiguous() for name, tensor in self.optimizer.items()}, folder / OPTIMIZER)
            if states:
                save_file(states, folder / RANDOM)
        except SafetensorError as error:
            raise StorageError(
                f"a checkpoint cannot be written: {error}",
                where=str(folder),
                help="free some space; the checkpoints before are whole",
            ) from None
        content = {"step": self.step, "run": self.run, "ranks": len(self.random_states), "notes": self.notes}
        (folder / STATE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainingState:
        """Read a complete checkpoint's folder."""
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        adapter = KnowledgeAdapter.from_pretrained(folder / ADAPTER)
        optimizer, states = (
            load_file(folder / name) if (folder / name).exists() else {} for name in (OPTIMIZER, RANDOM)
        )
        random_states: list[dict[str, torch.Tensor]] = [{} for _ in range(content["ranks"])]
        for name, tensor in states.items():
            rank, _, part = name.partition(".")
            random_states[int(rank)][part] = tensor
        return cls(
            config=adapter.config,
            tensors=dict(adapter.state_dict()),
            optimizer=optimizer,
            step=content["step"],
            run=content["run"],
            random_states=random_states,
            notes=content["notes"],
        )


def read_notes(folder: Path) -> dict[str, Any]:
    """`step`, `run` and `notes` of a checkpoint, without its tensors."""
    content: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return content


def seed_everything(seed: int, rank: int) -> None:
    """The random states at the beginning of a run: different on each rank."""
    number = (seed * 1_000_003 + rank) % (1 << 63)
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def random_state() -> dict[str, torch.Tensor]:
    """The states of Python's, numpy's and torch's generators in this process, as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_gauss": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    assert name == "MT19937"
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
