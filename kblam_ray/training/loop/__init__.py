"""The training loop: one process or many, plain data parallel or DeepSpeed ZeRO, with checkpoints."""
