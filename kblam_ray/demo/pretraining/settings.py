"""The settings of `jobs/pretrain_demo.py`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kblam_ray.job import JobConfig


class PretrainSettings(JobConfig):
    """How large the model is, what it reads and for how long."""

    output: str = Field("demo-model", description="folder for the model, the tokenizer, the embeddings and checkpoints")
    encoder: str = Field("all-MiniLM-L6-v2", description="sentence encoder in whose space questions are to be found")
    seed: int = Field(0, ge=0, description="of facts, documents and weights")
    num_facts: int = Field(140_000, ge=100, description="facts that the documents are about")
    adapter_facts: int = Field(
        30_000, ge=0, description="other facts of the same kinds, written beside the model for its adapters' training"
    )
    vocabulary: int = Field(5_120, ge=300, description="tokens of the tokenizer")
    hidden_size: int = Field(384, ge=8, description="numbers in one hidden state")
    num_layers: int = Field(4, ge=1, description="decoder layers")
    num_heads: int = Field(6, ge=1, description="query heads per layer")
    num_kv_heads: int = Field(6, ge=1, description="key/value heads per layer")
    mlp_size: int = Field(768, ge=8, description="width of the feed-forward parts")
    steps: int = Field(800, ge=1, description="optimizer steps")
    questions_per_step: int = Field(48, ge=1, description="questions without facts to read, per step")
    readings_per_step: int = Field(12, ge=1, description="questions with facts to read, per step")
    repeats_per_step: int = Field(8, ge=0, description="texts to say once more, per step")
    learning_rate: float = Field(3e-4, gt=0, description="its largest value")
    warmup_steps: int = Field(100, ge=0, description="steps in which the learning rate rises")
    decay_share: float = Field(0.5, gt=0, le=1, description="share of the steps, at the end, in which it falls to 0")
    weight_decay: float = Field(0.05, ge=0, description="of the matrices")
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient")
    meaning_weight: float = Field(1.0, ge=0, description="weight of the throw-away head's loss beside the next token's")
    wired: bool = Field(True, description="start with heads that find and copy, in closed form; see wiring.py")
    wiring_questions: int = Field(60_000, ge=1, description="questions that tell what each token means")
    checkpoint_steps: int = Field(100, ge=1, description="steps between checkpoints")
    resume: bool = Field(False, description="go on from the checkpoint in the output folder")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.wired and (self.num_heads != self.num_kv_heads or self.num_layers < 3):
            raise ValueError("a wired model has as many key/value heads as query heads, and at least 3 layers")
        return self
