"""What `jobs/train_adapter.py` takes; readable without torch.

One model is the flags, the YAML and what a checkpoint remembers. The parts `mix`, `losses`, `closed_form`,
`calibration` and `evaluation` are mappings in YAML and prefixed flags on the command line (`--mix-kb-per batch`).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.job import JobConfig
from kblam_ray.training.closed_form.settings import CalibrationSettings, ClosedFormSettings
from kblam_ray.training.mix.settings import LossSettings, MixSettings

CLOSED_FORM, RANDOM = "closed-form", "random"

FREE_ON_RESUME = frozenset(
    {
        *("output", "resume", "num_workers", "cpus_per_worker", "gpus_per_worker", "num_example_workers", "strategy"),
        *(
            "micro_batch_size",
            "checkpoint_activations",
            "compile",
            "device",
            "max_failures",
            "checkpoint_every",
            "keep",
        ),
        *("log_every", "tensorboard", "mlflow_uri", "mlflow_experiment", "wandb_project", "adapter_dtype"),
        *("evaluate_every", "evaluation_questions", "evaluation_facts", "evaluation", "evaluate", "calibrate"),
        *("calibration", "encoder_device"),
    }
)
"""Settings that leave the curve as it is, up to the rounding of sums that are added in another order."""


class TrainSettings(JobConfig):
    """Train an adapter for a frozen base model on any tables of embedded facts."""

    # What is trained on what.
    kb: list[str] = Field([], description="a table of facts to train on: a local path or s3://bucket/prefix")
    synthetic: int = Field(0, ge=0, description="facts to make up and embed, into a table in the output folder")
    synthetic_seed: int = Field(0, ge=0, lt=1 << 63, description="of the made-up facts")
    encoder: str | None = Field(
        None, description="encoder of the made-up facts (default: the tables', else all-MiniLM-L6-v2)"
    )
    encoder_device: str | None = Field(None, description="where that encoder runs (default: cuda if there is one)")
    base_model: str | None = Field(None, description="base model: a folder or a name on the hub (default: the demo's)")
    chat_template: str | None = Field(
        None, description="a built-in template's name or Jinja, in place of the tokenizer's own"
    )
    output: str = Field(
        description="folder of the adapter, its checkpoints and its curves: local or s3://bucket/prefix"
    )

    # The adapter.
    kind: Literal["shared", "paper"] = Field("shared", description="of the adapter")
    kb_layers: list[int] | None = Field(None, description="KB layers (default: found by the closed-form fit)")
    kb_layer_frequency: int | None = Field(None, gt=0, description="or every how manieth layer is a KB layer")
    retrieval_layers: list[int] | None = Field(None, description="KB layers that tell the facts used (default: found)")
    kb_scale: float | None = Field(None, gt=0, description="C: log C - log M is added to the KB logits")
    refusal_text: str | None = Field(None, description="the answer to teach when no fact applies")
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the tensors that are written at the end"
    )

    # How it is trained.
    method: Literal["train", "closed-form"] = Field("train", description="closed-form: the fit alone, no gradient step")
    start: str = Field(
        CLOSED_FORM, description="what training starts from: closed-form, random, or an adapter's folder"
    )
    steps: int = Field(1_000, ge=1, description="optimizer steps")
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples of one forward pass (default: a worker's whole share of the batch)"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of query heads, gates and key projection")
    value_rate: float = Field(10.0, gt=0, description="the value projection's, in multiples of that")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's")
    warmup_steps: int = Field(20, ge=0, description="steps over which the learning rate rises")
    last_learning_rate: float = Field(0.01, ge=0, le=1, description="what the cosine ends at, as a share of the peak")
    gradient_clipping: float | None = Field(
        None, ge=0, description="largest norm of the gradient, 0: none (default: the DeepSpeed file's, else 1)"
    )
    strategy: str = Field(
        "ddp", description="ddp (plain data parallel), zero1, zero2, zero3, or a DeepSpeed JSON file of your own"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the frozen base model; the adapter's weights are float32"
    )
    checkpoint_activations: bool = Field(False, description="compute activations again in the backward pass")
    compile: bool = Field(False, description="compile the base model's layers with torch.compile")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of everything that has no seed of its own set")

    # Where it runs.
    num_workers: int = Field(1, ge=0, description="training processes on Ray Train; 0: in this process, without Ray")
    cpus_per_worker: float | None = Field(
        None, gt=0, description="logical CPUs that Ray sets aside for each (default: 1)"
    )
    gpus_per_worker: float = Field(1.0, gt=0, description="GPUs of each, with --device cuda")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where this machine or cluster has one"
    )
    num_example_workers: int = Field(
        0, ge=0, description="Ray tasks per worker that make examples ahead; 0: each worker makes its own"
    )
    max_failures: int = Field(3, ge=0, description="how often failed workers are started again by themselves")

    # Checkpoints and curves.
    resume: bool = Field(False, description="go on from the newest complete checkpoint in the output folder")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints; there is always one at the end")
    keep: int = Field(3, ge=1, description="newest checkpoints to keep")
    log_every: int = Field(10, ge=1, description="steps between two lines of figures")
    tensorboard: bool = Field(True, description="write TensorBoard event files into the output folder")
    mlflow_uri: str | None = Field(None, description="MLflow tracking server or folder to report to")
    mlflow_experiment: str = Field("kblam-ray", description="MLflow experiment")
    wandb_project: str | None = Field(None, description="Weights & Biases project to report to")

    # Evaluation.
    evaluate_every: int = Field(0, ge=0, description="steps between small evaluations on held-out facts; 0: none")
    evaluation_questions: int = Field(64, ge=1, description="questions of a small evaluation")
    evaluation_facts: int = Field(200, ge=1, description="facts in its knowledge base")
    calibrate: bool = Field(True, description="calibrate prior and refusal on held-out questions at the end")
    evaluate: bool = Field(True, description="evaluate at the end, on held-out questions")

    mix: MixSettings = Field(default_factory=MixSettings, description="the examples")
    losses: LossSettings = Field(default_factory=LossSettings, description="weights of the loss's terms")
    closed_form: ClosedFormSettings = Field(default_factory=ClosedFormSettings, description="the closed-form fit")
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings, description="the calibration")
    evaluation: EvaluationSettings = Field(
        default_factory=lambda: EvaluationSettings(num_facts=[100, 1_000], num_questions=100),
        description="the evaluation at the end",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.kb and not self.synthetic:
            raise ValueError("give --kb, --synthetic, or both")
        if self.kb_layers is not None and self.kb_layer_frequency is not None:
            raise ValueError("give --kb-layers or --kb-layer-frequency, not both")
        share, rest = divmod(self.mix.batch_size, max(1, self.num_workers))
        if self.method == "train":
            if rest:
                raise ValueError(
                    f"--mix-batch-size {self.mix.batch_size} is no multiple of --num-workers {self.num_workers}"
                )
            if share % (self.micro_batch_size or share):
                raise ValueError(
                    f"a worker's {share} examples are no multiple of --micro-batch-size {self.micro_batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _spread_seed(self) -> Self:
        """Parts without a seed of their own take this one; the split into held-out and other facts is one for all."""
        held_out = {"held_out": self.mix.held_out or None, "held_out_seed": self.mix.held_out_seed}
        for name in ("mix", "closed_form", "calibration", "evaluation"):
            part = getattr(self, name)
            given: dict[str, Any] = {} if "seed" in part.model_fields_set else {"seed": self.seed}
            if name == "evaluation":
                given |= held_out
            elif name == "closed_form":
                given = _other_split(part, given, self.mix)
            setattr(self, name, part.model_copy(update=given))
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches of each worker's share of a step."""
        share = self.mix.batch_size // max(1, self.num_workers)
        return share // (self.micro_batch_size or share)

    def of_the_run(self) -> dict[str, Any]:
        """The settings that a run must keep when it is resumed, as JSON has them."""
        return self.model_dump(mode="json", exclude=set(FREE_ON_RESUME))


def _other_split(part: ClosedFormSettings, given: dict[str, Any], mix: MixSettings) -> dict[str, Any]:
    """The fit holds out entities of those that are left: by the same seed it would find none."""
    if given:
        return {"seed": given["seed"] + (given["seed"] == mix.held_out_seed)}
    if part.seed == mix.held_out_seed:
        raise ValueError(f"--closed-form-seed and --mix-held-out-seed are both {part.seed}: give different ones")
    return given
