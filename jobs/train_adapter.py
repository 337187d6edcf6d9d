"""Train an adapter for a frozen base model: fitted in closed form, then by gradient on Ray Train and DeepSpeed.

    python jobs/train_adapter.py --kb kb/world --base-model models/llama --output adapters/world --method closed-form
    python jobs/train_adapter.py --synthetic 20000 --output adapters/mine --steps 2000 --num-workers 2 --strategy zero2
    python jobs/train_adapter.py --config cluster/train/llama-3-8b.yaml --kb s3://bucket/kb --output s3://bucket/adapter

Interrupted, it goes on from its newest checkpoint with the same arguments and `--resume`. The output folder holds the
adapter with its model card, `checkpoints/`, `metrics.jsonl`, TensorBoard's files and the settings as YAML.
"""

from typing import Any

from kblam_ray.demo import shipped
from kblam_ray.errors import InputError
from kblam_ray.job import main, packages_of
from kblam_ray.training.settings import TrainSettings


def train(settings: TrainSettings) -> dict[str, Any]:
    if settings.base_model is None:
        if not shipped.BASE_MODEL.is_dir():
            raise InputError(
                "no base model: the demo's, which would be used, is not part of this version",
                where="--base-model",
                help="give a folder or a name on the hub",
            )
        settings = settings.model_copy(update={"base_model": str(shipped.BASE_MODEL)})
    with packages_of("train", "training needs"):
        from kblam_ray.training.loop.run import train
    return train(settings)


if __name__ == "__main__":
    main("train_adapter", TrainSettings, train)
