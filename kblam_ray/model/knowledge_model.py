"""A base model with an adapter on it: load knowledge, ask, generate, see which facts were attended to.

Shape legend: B batch, T prompt tokens, A answer tokens, M facts, L KB layers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.attach import Attachment, attach
from kblam_ray.attention.batch import Knowledge
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.trace import Trace, trace
from kblam_ray.encoders.base import Encoder
from kblam_ray.encoders.load import load_encoder
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import AdapterMismatchError, InputError
from kblam_ray.model import asking
from kblam_ray.model.base_model import load_base_model, read_base_config, usable_device
from kblam_ray.model.bundle import Bundle, is_bundle
from kblam_ray.model.chat import ChatTemplate, Message
from kblam_ray.model.matching import require_encoder
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.knowledge_base import KnowledgeBase

if TYPE_CHECKING:
    from kblam_ray.model.asking import Answer


class KnowledgeModel(nn.Module):
    """A decoder that attends to facts.

    Attributes:
        base_model: the transformers model, with the adapter attached until `detach`.
        adapter: the knowledge adapter.
        tokenizer: of the base model, or None.
        bundle: what it was loaded from, or None.

    Args:
        base_model: a transformers model in memory.
        adapter: made for a model of its shape.
        tokenizer: needed to ask questions.
        encoder: what reads questions where the adapter has a question prior or facts are selected by similarity; a
            loaded encoder, a name or settings. By default the adapter's encoder is loaded when it is first needed.

    Raises:
        AdapterMismatchError: the adapter was made for another shape of model.
        UnsupportedModelError: knowledge cannot be attached to this kind of model.
        EncoderMismatchError: `encoder` is loaded and is not the adapter's.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        adapter: KnowledgeAdapter,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder: Encoder | EncoderSettings | str | None = None,
    ) -> None:
        super().__init__()
        adapter.config.check_base(base_model.config)
        if isinstance(encoder, Encoder):
            require_encoder(adapter.config, encoder.spec, where="encoder")
        self._attachment: Attachment | None = attach(base_model, adapter)
        self.base_model = base_model
        self.adapter = adapter if adapter.device == base_model.device else adapter.to(base_model.device)
        self.tokenizer = tokenizer
        self.bundle: Bundle | None = None
        self._encoder = encoder
        self._prior: QuestionPrior | None = None
        self._making_prior = threading.Lock()
        self._chat: tuple[str | None, ChatTemplate] | None = None

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path,
        adapter: str | Path | KnowledgeAdapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        encoder: Encoder | EncoderSettings | str | None = None,
    ) -> Self:
        """Load a base model and an adapter, or one bundled folder. Whether they fit is checked before the weights.

        Args:
            base_model: folder or hub name; or a folder that `bundle_model` wrote, then without `adapter`.
            adapter: folder or hub name, or an adapter in memory.
            device: None is a CUDA device if there is one, else the CPU.
            dtype: of the base model; None is what its configuration states. The adapter keeps its own.
            encoder: see `KnowledgeModel`.

        Raises:
            InputError: there is no such base model or device; no adapter, and the folder is no bundle.
            AdapterError, AdapterMismatchError, UnsupportedModelError: see `KnowledgeModel`.
        """
        bundle = None
        if adapter is None:
            if not is_bundle(base_model):
                raise InputError(
                    "no adapter, and the base model is not a bundled folder",
                    where=str(base_model),
                    help="give an adapter, or a folder written by jobs/bundle_model.py",
                )
            bundle = Bundle.read(base_model)
            base_model, adapter = bundle.base_model, bundle.adapter
        elif is_bundle(base_model):
            raise InputError(
                "an adapter, and a bundled folder that has its own",
                where=str(base_model),
                help="give the folder alone, or its base model with the adapter",
            )
        device = usable_device(device)
        if not isinstance(adapter, KnowledgeAdapter):
            adapter = KnowledgeAdapter.from_pretrained(adapter, device=device)
        adapter.config.check_base(read_base_config(base_model))
        if isinstance(encoder, Encoder):
            require_encoder(adapter.config, encoder.spec, where="encoder")
        loaded, tokenizer = load_base_model(base_model, device, dtype)
        model = cls(loaded, adapter, tokenizer, encoder)
        model.bundle = bundle
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of base model and adapter, attached to each other; the encoder, which never changes, is shared."""
        for shared in (self._encoder, self._prior, self._making_prior):
            memo[id(shared)] = shared
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @property
    def attachment(self) -> Attachment:
        """The adapter's attachment to the base model.

        Raises:
            AdapterMismatchError: it was detached.
        """
        if self._attachment is None:
            raise AdapterMismatchError(
                "the adapter was detached from the base model", help="make another KnowledgeModel of the two"
            )
        return self._attachment

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model."""
        return self.base_model.dtype

    @property
    def chat(self) -> ChatTemplate:
        """What turns conversations into token ids: the adapter's chat template, else the tokenizer's.

        Raises:
            InputError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer", help="give tokenizer= when making the KnowledgeModel")
        template = self.adapter.config.chat_template
        if self._chat is None or self._chat[0] != template:
            self._chat = template, ChatTemplate(self.tokenizer, template)
        return self._chat[1]

    @property
    def prior(self) -> QuestionPrior:
        """The question prior with the adapter's settings as they are now; loads the encoder if need be.

        Raises:
            InputError: neither adapter nor caller names an encoder.
            EncoderMismatchError, EncoderNotFoundError, EncoderError: the adapter's encoder cannot be had.
        """
        config = self.adapter.config
        settings = config.question_prior, config.prior_context, config.prior_lexical
        with self._making_prior:  # an encoder is loaded once, whoever asks first
            prior = self._prior
            if prior is None or (prior.beta, prior.context, prior.gamma) != settings:
                prior = self._prior = QuestionPrior.of(config, self._loaded_encoder())
        return prior

    def _loaded_encoder(self) -> Encoder:
        if isinstance(self._encoder, Encoder):
            return self._encoder
        named, config = self._encoder, self.adapter.config
        if named is None and config.encoder is not None:
            named = EncoderSettings(name=config.encoder.name, expected_revision=config.encoder.revision)
        if named is None:
            raise InputError(
                "the adapter does not say which encoder reads questions",
                where="encoder",
                help="give encoder= when making the KnowledgeModel",
            )
        encoder = load_encoder(named)
        require_encoder(config, encoder.spec, where="encoder")
        self._encoder = encoder
        return encoder

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        knowledge: Knowledge = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's output, attending to `knowledge`.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding.
            knowledge: a memory for all rows, a list with one memory or None per row, or None: the base model, bit
                for bit.
            kwargs: further arguments of the base model.
        """
        if knowledge is None:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        with self.attachment.using(knowledge):
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, knowledge: Knowledge = None, **kwargs: Any) -> Any:
        """What transformers' `generate` gives for its arguments, attending to `knowledge` as `forward` does."""
        if knowledge is None:
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]
        # A compiled forward pass would not see the knowledge.
        kwargs.setdefault("disable_compile", True)
        with self.attachment.using(knowledge):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def load(self, kb: KnowledgeBase | str | Path, version: int | None = None, form: str = "latent") -> KnowledgeMemory:
        """The facts of a knowledge base, ready to attend to.

        Beside a bfloat16 model embeddings become bfloat16; beside others they stay the table's float16, uncopied.

        Args:
            kb: a handle, or a path or URI.
            version: None is the handle's version, or the newest.
            form: "latent", "materialized" or "auto".

        Raises:
            EncoderMismatchError: the table was made with another encoder than the adapter.
            TableNotFoundError, TableError, StorageError: the table or version cannot be read.
        """
        if isinstance(kb, (str, Path)):
            kb = KnowledgeBase.open(str(kb), version)
        require_encoder(self.adapter.config, kb.encoder, where=kb.uri)
        snapshot = kb.snapshot(version)
        return KnowledgeMemory.from_embeddings(
            self.adapter,
            snapshot.key_embeddings_MP,
            snapshot.value_embeddings_MP,
            facts=snapshot.facts,
            fact_ids=snapshot.fact_ids_M,
            form=form,
            dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else None,
            device=self.device,
            version=snapshot.version,
            source=kb.table_id,
        )

    def knowledge(self, version: int | None = None, form: str = "latent") -> KnowledgeMemory:
        """The facts that the bundle names, at its version unless another is given.

        Raises:
            InputError: the model was not loaded from a bundle, or the bundle names no knowledge base.
        """
        if self.bundle is None or self.bundle.kb is None:
            raise InputError(
                "no bundle names the knowledge base of this model", help="load one: `model.load(kb)` with its path"
            )
        return self.load(self.bundle.kb.uri, self.bundle.kb.version if version is None else version, form)

    def refresh(self, memory: KnowledgeMemory, kb: KnowledgeBase | str | Path) -> KnowledgeMemory:
        """The memory of the newest version, made of this one at the cost of what changed; this one stays valid.

        Args:
            memory: a whole memory that came from `kb`: no selection, no prior.
            kb: a handle, or a path or URI. A handle that is pinned gives its own version, newer or older.

        Raises:
            InputError: the memory has no version, is a selection, or came from another table: one that was deleted and
                made anew at the same place, for example.
            EncoderMismatchError: the table was made anew with another encoder.
            TableNotFoundError, TableError, StorageError: the table cannot be read.
        """
        if memory.version is None:
            raise InputError(
                "the memory has no KB version", help="refresh memories made by `model.load`; load the others again"
            )
        memory.check_adapter(self.adapter)
        if isinstance(kb, (str, Path)) or not kb.pinned:
            # A handle of its own: the caller's stays where it is.
            kb = KnowledgeBase.open(str(kb) if isinstance(kb, (str, Path)) else kb.uri)
        require_encoder(self.adapter.config, kb.encoder, where=kb.uri)
        if memory.source is not None and kb.table_id != memory.source:
            raise InputError(
                "the memory came from another table than the one that is there now",
                where=kb.uri,
                help="load it: `model.load(kb)`",
            )
        if kb.version is None or kb.version == memory.version:
            return memory
        return memory.apply(kb.changes(memory.version, kb.version))

    def prepare(
        self, memory: KnowledgeMemory | None, question: str | Sequence[Message], selection: str = "all"
    ) -> KnowledgeMemory | None:
        """The memory that one question attends to: with the adapter's question prior, and of the selected facts.

        Args:
            selection: "all" or "similar:K".
        """
        num_facts = asking.parse_selection(selection)
        config = self.adapter.config
        is_plain = num_facts is None and not config.question_prior and not config.prior_lexical
        if memory is None or is_plain or not memory.num_facts:
            return memory
        return self.prior.apply(memory, asking.as_messages(question), num_facts)

    def ask(
        self,
        question: str | Sequence[Message],
        memory: KnowledgeMemory | None,
        grounding: str = "cite",
        selection: str = "all",
        max_citations: int = 5,
        max_new_tokens: int = 64,
    ) -> Answer:
        """Answer a question from the facts of a memory.

        Args:
            question: a text, or a conversation whose last message is the user's.
            memory: what to attend to; None asks the base model.
            grounding: "off": the answer alone; "cite": with the facts that it attended to; "verbatim": the facts that
                the question attends to most are read, and every value stated is the exact text of a fact cited.
            selection: "all" facts, or only the K that the question is nearest to: "similar:K".
            max_citations: most facts to cite, by falling share of attention; the answer does not depend on it.
            max_new_tokens: longest answer that the model writes; "verbatim" never cuts a value short.

        Returns:
            `.text .citations .refused .kb_version`; refused if the text is the adapter's refusal, or the adapter has
            a threshold and the statistic of the best facts is below it. "verbatim" then says the refusal, as it does
            where there are no facts; the other two leave the text.

        Raises:
            InputError: a setting or a message that cannot be, or the model has no tokenizer; "verbatim" without a
                memory, or with one that has no texts; a refusal decision that needs texts which the memory lacks.
            EncoderMismatchError, EncoderNotFoundError, EncoderError: the question must be encoded and cannot be.
        """
        return asking.ask(
            self,
            question,
            memory,
            grounding=grounding,
            selection=selection,
            max_citations=max_citations,
            max_new_tokens=max_new_tokens,
        )

    def trace(
        self, input_ids: torch.Tensor, knowledge: Knowledge, answer_start: int | Sequence[int], top_n: int = 5
    ) -> Trace:
        """The facts attended to at each answer token: `.fact_ids .shares` [B, L, A, top_n]; see `attention.trace`."""
        return trace(self.attachment, input_ids, knowledge, answer_start, top_n)

    def detach(self) -> None:
        """Take the adapter off: the base model is as it was, and this object can no longer attend to facts."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None


def load_bundle(
    folder: str | Path,
    *,
    form: str = "latent",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[KnowledgeModel, KnowledgeMemory]:
    """The model and the facts of a bundle, see `KnowledgeModel.from_pretrained` and `KnowledgeModel.knowledge`."""
    model = KnowledgeModel.from_pretrained(folder, device=device, dtype=dtype)
    return model, model.knowledge(form=form)
