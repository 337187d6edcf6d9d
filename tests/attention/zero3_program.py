"""One step of training under DeepSpeed's ZeRO-3, with every parameter partitioned, beside one without: `main` below.

A program of its own, because DeepSpeed and its process group are for a whole process. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile

import deepspeed
import torch
from tiny import random_facts, random_ids, tiny_adapter, tiny_llama
from torch import nn

from kblam_ray.attention import attach
from kblam_ray.attention.partitioned import external_parameters
from kblam_ray.errors import AdapterError

# Smaller parameters than this stay whole in every process: 0 lets none stay.
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class Training(nn.Module):
    """Runs the base model with an adapter attached, whose parameters it makes known."""

    def __init__(self, adapter, base_model, is_known: bool) -> None:
        super().__init__()
        self.adapter, self.base = adapter, base_model
        self._attachment = attach(base_model, adapter)
        if is_known:
            for parameter in external_parameters(adapter):
                deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, ids_BT):
        memories = [random_facts(5, seed=seed).memory(self.adapter) for seed in range(len(ids_BT))]
        logits = self.base(ids_BT, knowledge=memories, use_cache=False).logits
        return torch.log_softmax(logits[:, :-1], -1).gather(-1, ids_BT[:, 1:, None]).mean()


def parts(kind: str, seed: int = 0):
    base_model = tiny_llama().requires_grad_(False)
    return tiny_adapter(base_model, kind, seed=seed).train().requires_grad_(True), base_model


def steps_of(run, optimize, ids_BT) -> list[float]:
    losses = []
    for _ in range(3):
        loss = run(ids_BT)
        optimize(loss)
        losses.append(loss.item())
    return losses


def main(kind: str) -> None:
    torch.set_num_threads(1)
    # Else it is compiled first, which takes minutes; one process has nobody to share memory with.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ids_BT = random_ids(2, 6)
    with tempfile.NamedTemporaryFile() as meeting_place:
        deepspeed.init_distributed("gloo", init_method=f"file://{meeting_place.name}", rank=0, world_size=1)
        adapter, base_model = parts(kind)
        plain = Training(adapter, base_model, is_known=False)
        optimizer = torch.optim.SGD(adapter.parameters(), 0.05)

        def optimize(loss):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        expected = steps_of(plain, optimize, ids_BT)
        wanted = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}

        adapter, base_model = parts(kind)
        training = Training(adapter, base_model, is_known=True)
        engine, *_ = deepspeed.initialize(
            model=training, optimizer=torch.optim.SGD(adapter.parameters(), 0.05), config=CONFIG
        )
        is_partitioned = all(not parameter.numel() for parameter in adapter.parameters())

        def optimize_partitioned(loss):
            engine.backward(loss)
            engine.step()

        found = steps_of(engine, optimize_partitioned, ids_BT)
        message = ""
        try:
            with torch.no_grad():
                base_model(ids_BT, knowledge=random_facts(5).memory(adapter))
        except AdapterError as error:
            message = str(error)
        with deepspeed.zero.GatheredParameters(list(adapter.parameters())):
            difference = max(
                (tensor - wanted[name]).abs().max().item() for name, tensor in adapter.state_dict().items()
            )
            with torch.no_grad():
                gathered = base_model(ids_BT, knowledge=random_facts(5).memory(adapter)).logits
        with torch.no_grad():
            without_facts = base_model(ids_BT).logits
        print(
            json.dumps(
                {
                    "expected": expected,
                    "found": found,
                    "is_partitioned": is_partitioned,
                    "difference": difference,
                    "message": message,
                    "facts_count": bool((gathered - without_facts).abs().max() > 0.01),
                }
            )
        )
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
