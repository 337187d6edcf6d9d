"""Pretrain the small base model that ships with the package, from nothing, on text that is made on the way.

python jobs/pretrain_demo.py --output demo-model
python jobs/pretrain_demo.py --output demo-model --resume
"""

from typing import Any

from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.job import main


def run(settings: PretrainSettings) -> dict[str, Any]:
    from kblam_ray.demo.pretraining.train import pretrain

    return pretrain(settings)


if __name__ == "__main__":
    main("pretrain_demo", PretrainSettings, run)
