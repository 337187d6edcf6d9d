"""DeepSpeed's settings: one of the shipped files, or the user's own, completed with what the job's flags decide.

The shipped files are `deepspeed/zero{1,2,3}.json` beside this module, so that an installed package has them;
`cluster/deepspeed/` shows the same files, and for each stage one that keeps the optimizer's states in the machine's
memory. They set gradient clipping and everything else whose default would change results between versions of DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path
from typing import Any

from kblam_ray.errors import InputError, MissingDependencyError

SHIPPED = ("zero1", "zero2", "zero3")

DEFAULT_CLIPPING = 1.0
"""Largest gradient norm where neither flag nor file says one."""

_OURS = {
    "optimizer": "the job makes AdamW: --learning-rate, --value-rate, --weight-decay",
    "scheduler": "the job has a cosine schedule with warm-up: --learning-rate, --warmup-steps, --steps",
}


def read_deepspeed_config(strategy: str) -> dict[str, Any]:
    """DeepSpeed's settings by the name of a shipped file, or from a JSON file of one's own.

    Raises:
        InputError: no such file, no JSON object, no ZeRO stage from 1 to 3, or settings that are the job's.
    """
    try:
        if strategy in SHIPPED:
            text = (resources.files("kblam_ray.training.loop") / "deepspeed" / f"{strategy}.json").read_text("utf-8")
        else:
            text = Path(strategy).read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read DeepSpeed's settings: {error}",
            where=strategy,
            help=f"give {', '.join(SHIPPED)}, ddp, or a JSON file such as those in cluster/deepspeed/",
        ) from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise InputError(
            'the file has no {"zero_optimization": {"stage": 1, 2 or 3}}',
            where=strategy,
            help="add it, or train with --strategy ddp",
        )
    for name, instead in _OURS.items():
        if name in config:
            raise InputError(f"the file sets {name!r}", where=strategy, help=f"take it out: {instead}")
    for name in ("fp16", "bf16"):
        if isinstance(config.get(name), dict) and config[name].get("enabled"):
            raise InputError(
                f"the file enables {name!r}, which would cast the adapter",
                where=strategy,
                help="take it out: the adapter keeps float32 weights, and --dtype casts the frozen base model",
            )
    if zero.get("compute_grad_norm") is False:
        raise InputError(
            "the file turns compute_grad_norm off", where=strategy, help="take it out: the norm shows a run that fails"
        )
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise InputError(
                f"the file has {name} go to {device!r}",
                where=strategy,
                help='say "cpu": checkpoints of this job hold what is in memory, and nothing that is swapped to disk',
            )
    return config


def require_deepspeed() -> None:
    """Raises MissingDependencyError where DeepSpeed is not installed; does not import it, which takes seconds."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "ZeRO needs the package deepspeed",
            where="--strategy",
            help="pip install 'kblam-ray[train]', or train with --strategy ddp",
        )


def clipping_of(strategy: str, given: float | None) -> float:
    """The largest gradient norm of a run: the flag's, else the file's, else 1; 0 is no clipping.

    Raises:
        InputError: see `read_deepspeed_config`.
    """
    if given is not None:
        return given
    stated = None if strategy == "ddp" else read_deepspeed_config(strategy).get("gradient_clipping")
    return float(stated) if isinstance(stated, int | float) else DEFAULT_CLIPPING


def completed(config: dict[str, Any], *, micro_batch_size: int, accumulation: int, clipping: float) -> dict[str, Any]:
    """The settings with the numbers that the job decides in the place of "auto".

    Raises:
        InputError: the file states other numbers than the job's flags.
    """
    decided = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    for name, number in decided.items():
        if config.get(name, "auto") not in ("auto", number):
            raise InputError(
                f"DeepSpeed's file says {name} is {config[name]}, the flags come to {number}",
                where="--strategy",
                help='write "auto" in the file, or change --batch-size, --micro-batch-size or --num-workers',
            )
    config = {name: value for name, value in config.items() if name != "train_batch_size"}
    return {**config, **decided, "gradient_clipping": clipping}
