"""The adapter: what is trained so that one base model can attend to the facts of one sentence encoder.

Shape legend: L KB layers, S slots of the key vector (S >= L), N query heads, H head dim, P encoder dim.

| kind   | module                 | what it computes                                                              |
|--------|------------------------|-------------------------------------------------------------------------------|
| paper  | `key_projection`       | base embedding of a key text (P) -> key vector (S*N*H)                        |
| paper  | `query_heads[layer]`   | hidden state -> a query per head (N*H), no bias                               |
| shared | `query_heads[layer]`   | hidden state -> one query in the encoder's space (P), for all heads           |
| shared | `gates[layer]`         | hidden state -> how much each head listens to the KB (N)                      |
| shared | `key_mean`, `key_scale`| mean (P) and scale (1) of the encoder's key embeddings                        |
| both   | `value_projection`     | base embedding of a value text (P) -> the values of all slots and heads (S*N*H) |

Kind "paper" is KBLaM (arXiv 2410.10450, eqs. 5-8); kind "shared" scores a fact once for all heads of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kblam_ray.attention.adapter.base_probe import device_of
from kblam_ray.attention.adapter.config import STRUCTURE, AdapterConfig, EncoderRef
from kblam_ray.attention.adapter.initialise import settings_for, starting_tensors
from kblam_ray.attention.adapter.kblam_checkpoint import State, read_checkpoint
from kblam_ray.attention.adapter.loading import check_dtype, check_numbers, check_tensors, common_dtype, read_adapter
from kblam_ray.attention.adapter.saving import push_adapter, write_adapter
from kblam_ray.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Token:
    """Stands for one tensor or one state of an adapter; a copy or a pickled one stands for something else."""

    def __reduce__(self) -> tuple:
        return _Token, ()


class KnowledgeAdapter(nn.Module):
    """Projections, query heads and gates for one base model and one encoder.

    Made by `from_pretrained`, `from_kblam` or `for_model`; the constructor alone leaves the tensors as torch
    initialises them.

    Attributes:
        key_projection: Linear(P, S*N*H), kind "paper" only.
        value_projection: Linear(P, S*N*H).
        query_heads: per KB layer, by its number as text, Linear(hidden, N*H) without bias, or Linear(hidden, P).
        gates: per KB layer Linear(hidden, N), kind "shared" only.
        key_mean, key_scale: buffers [P] and [1], kind "shared" only.
    """

    key_mean: torch.Tensor
    key_scale: torch.Tensor

    def __init__(
        self, config: AdapterConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._config = config
        self._state = _Token()
        hidden, width = config.base_shape.hidden_size, config.heads_width
        layers = [str(layer) for layer in config.layers]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if config.kind == "paper":
            self.key_projection = nn.Linear(config.dim, config.slots * width, **made)
            self.query_heads = nn.ModuleDict({layer: nn.Linear(hidden, width, bias=False, **made) for layer in layers})
        else:
            self.query_heads = nn.ModuleDict({layer: nn.Linear(hidden, config.dim, **made) for layer in layers})
            heads = config.base_shape.num_heads
            self.gates = nn.ModuleDict({layer: nn.Linear(hidden, heads, **made) for layer in layers})
            self.register_buffer("key_mean", torch.zeros(config.dim, **made))
            self.register_buffer("key_scale", torch.ones(1, **made))
        self.value_projection = nn.Linear(config.dim, config.slots * width, **made)

    @classmethod
    def of_tensors(
        cls,
        config: AdapterConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        where: str | None = None,
    ) -> Self:
        """An adapter that holds copies of `tensors`, in evaluation mode.

        Args:
            tensors: by the names of `config.tensor_shapes()`.
            device: where to put them; None leaves them where they are.
            dtype: of all of them; None is the one that holds all of theirs without loss.

        Raises:
            AdapterError: a tensor is missing, superfluous, of another shape, no floating-point one or not finite, as
                it is or as `dtype`.
        """
        check_tensors(config, tensors, where=where)
        if dtype is None:
            dtype = common_dtype(tensors.values())
        check_dtype(dtype, where="dtype")
        adapter = cls(config, device="meta")
        # Whoever loads in inference mode may train later.
        with torch.inference_mode(False):
            copies = {name: tensor.detach().to(device, dtype, copy=True) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                check_numbers(name, copies[name], where=where)
        nn.Module.load_state_dict(adapter, copies, assign=True)
        return adapter.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load an adapter from its folder, or from the Hugging Face hub by its `owner/name`.

        Args:
            device: where to put it; None is the CPU.
            dtype: of the tensors; None keeps the stored one.
            revision: branch, tag or commit on the hub; None is the newest.

        Raises:
            AdapterError: the folder has no adapter, or a damaged or unsafe one, or one of a newer format.
            StorageError: the files cannot be read or the hub cannot be reached.
        """
        config, tensors, folder = read_adapter(path, revision=revision)
        return cls.of_tensors(config, tensors, device=device, dtype=dtype, where=str(folder))

    @classmethod
    def from_kblam(
        cls,
        encoder_state: State,
        model_state: State,
        base_config: PretrainedConfig,
        *,
        kb_layer_frequency: int = 3,
        kb_scale: float | None = None,
        encoder: EncoderRef | None = None,
    ) -> Self:
        """Read a checkpoint of the published KBLaM or AtlasKV training code; see `kblam_checkpoint.py`.

        Args:
            encoder_state: name -> tensor, or a path: the two projections.
            model_state: name -> tensor, or a path (a file, a folder, a sharded index): the query heads.
            base_config: transformers configuration of the base model.
            kb_layer_frequency: every how manieth layer is a KB layer; the code's default is 3.
            kb_scale: C; None is the one that a checkpoint folder's own configuration states, else no shift.
            encoder: the sentence encoder, where it is known.

        Raises:
            AdapterError: MLP projectors, missing or differently shaped tensors, another number of slots, or files
                that cannot be read safely.
        """
        config, tensors = read_checkpoint(
            encoder_state, model_state, base_config, kb_layer_frequency, kb_scale, encoder
        )
        return cls.of_tensors(config, tensors)

    @classmethod
    def for_model(
        cls,
        base_model: PreTrainedModel,
        *,
        kind: Literal["paper", "shared"] = "shared",
        encoder: EncoderRef | None = None,
        dim: int | None = None,
        kb_layer_frequency: int | None = None,
        kb_layers: list[int] | None = None,
        sample_ids_BT: torch.Tensor | None = None,
        text_log_sum_exp_LN: torch.Tensor | None = None,
        sample_keys_MP: torch.Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Self:
        """A new adapter, initialised so that training starts well; `initialise.py` says how.

        Args:
            base_model: the transformers model, with its weights; it runs once over the sample.
            encoder: the sentence encoder; or give only `dim`, its P.
            kb_layer_frequency, kb_layers: one of the two; with neither every third layer is a KB layer.
            sample_ids_BT: token ids of typical text, without padding; None: a few random tokens.
            text_log_sum_exp_LN: [L, N] mean log-sum-exp of the text logits, at which kind "shared" sets the gates'
                biases; None: as measured over the sample. `base_probe.probe` measures it over padded batches, too.
            sample_keys_MP: some base embeddings of key texts, whose mean and scale kind "shared" stores; None: 0 and 1.
            device: None is that of the base model's embeddings.
            dtype: of the tensors. Training in 16 bit loses small updates: keep float32.
            settings: further fields of `AdapterConfig`, such as `kb_scale`.

        Raises:
            AdapterError: settings that do not go together.
            UnsupportedModelError: the layers' query or value projections cannot be found or are quantised.
        """
        config = settings_for(base_model, kind, encoder, dim, kb_layer_frequency, kb_layers, sample_keys_MP, settings)
        tensors = starting_tensors(base_model, config, sample_ids_BT, text_log_sum_exp_LN, sample_keys_MP, seed)
        device = device or device_of(base_model)
        return cls.of_tensors(config, tensors, device=device, dtype=dtype).train()

    def save_pretrained(self, path: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and a model card `README.md` into a folder.

        A new folder appears with everything in it or not at all. In one that exists each file is replaced in one
        step, the tensors first, and a model card that someone has written or edited is kept.

        Args:
            state_dict: the tensors to write instead of the adapter's own: where they are partitioned over processes,
                whoever gathered them gives them here.

        Raises:
            AdapterError: the path is a file, or the tensors are not finite.
            StorageError: the disk cannot be written.
        """
        write_adapter(path, self._config, self.state_dict() if state_dict is None else state_dict)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload the knowledge adapter",
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; an edited model card there is kept.

        Returns:
            The address of the commit.

        Raises:
            AdapterError: the hub refuses the name or the credentials.
            StorageError: the hub cannot be reached.
        """
        return push_adapter(
            repo_id, self._config, self.state_dict(), private, commit_message, revision=revision, token=token
        )

    @property
    def config(self) -> AdapterConfig:
        """The adapter's settings; `configure` changes them."""
        return self._config

    def configure(self, **settings: Any) -> None:
        """Change settings that no tensor depends on, for example `question_prior` or `refusal_threshold`.

        Raises:
            AdapterError: an unknown setting, a value it cannot have, or one that the tensors depend on.
        """
        fixed = [name for name in settings if name in STRUCTURE]
        if fixed:
            raise AdapterError(
                f"{', '.join(fixed)} cannot be changed on an adapter: its tensors depend on it",
                help="make a new adapter with `KnowledgeAdapter.for_model`",
            )
        self._config = self._config.changed(**settings)
        self.weights_changed()

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return self.value_projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What its tensors are."""
        return self.value_projection.weight.dtype

    def weights_key(self) -> tuple:
        """A hashable value that changes whenever the weights may have changed.

        What is derived from the weights may be kept as long as the key stays the same. Noticed by itself: a step of
        any torch optimizer in this process, other changes in place, new tensors, moves and casts, loading, `train()`
        and `eval()`. Not noticed: writing through `.data` outside of an optimizer: call `weights_changed` then.
        """
        return (self._state, _optimizer_steps, *(_identity(tensor) for tensor in self._tensors()))

    def weights_changed(self) -> None:
        """Say that the weights changed in a way that torch does not count, see `weights_key`."""
        self._state = _Token()

    def _tensors(self) -> Iterator[torch.Tensor]:
        # Not `parameters()`: that walks the module tree with de-duplication, and this runs in every forward pass.
        linears: list[Any] = [self.value_projection, *self.query_heads.values()]
        if self._config.kind == "paper":
            linears.append(self.key_projection)
        else:
            linears += self.gates.values()
            yield self.key_mean
            yield self.key_scale
        for linear in linears:
            yield linear.weight
            if linear.bias is not None:
                yield linear.bias

    def train(self, mode: bool = True) -> Self:
        self.weights_changed()
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.weights_changed()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.weights_changed()
        return super()._apply(*args, **kwargs)


# torch counts the changes of a tensor, except those by its fused optimizers and by those that shard parameters.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def _identity(tensor: torch.Tensor) -> tuple[_Token, int, int]:
    # Not id(): a new tensor often gets the id, the address and the version of the one it replaces.
    token = tensor.__dict__.get("_kblam_token")
    if token is None:
        token = tensor.__dict__["_kblam_token"] = _Token()
    return token, -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()
