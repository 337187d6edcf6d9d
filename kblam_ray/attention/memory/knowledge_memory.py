"""A knowledge memory: the facts of one KB version in chunks, ready for one adapter to attend to.

A memory never changes. A change of the knowledge base, a selection of facts or a prior over them gives another memory
that shares all it can with the one before, which stays valid for the requests that use it. Any number of threads may
use one. Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.memory import fact_texts
from kblam_ray.attention.memory.chunk import ChunkView
from kblam_ray.attention.memory.held_bytes import HeldBytes
from kblam_ray.attention.memory.intake import checked_chunk, split_chunk
from kblam_ray.attention.memory.priors import selected_prior, split_prior
from kblam_ray.attention.memory.tiers import consolidate
from kblam_ray.errors import AdapterMismatchError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

Form = Literal["latent", "materialized"]

MATERIALIZED_FACTS = 256
"""Most facts that `auto` keeps materialized: there, keys and values are small and a prefill is cheaper with them."""


class Upserts(Protocol):
    """Facts that are new or have new values; row m of each part is the same fact. A table's snapshot is one."""

    @property
    def facts(self) -> pa.Table: ...
    @property
    def key_embeddings_MP(self) -> np.ndarray: ...
    @property
    def value_embeddings_MP(self) -> np.ndarray: ...


class Changes(Protocol):
    """What makes the facts of one version those of another, as `KnowledgeBase.changes` gives it."""

    @property
    def from_version(self) -> int | None: ...
    @property
    def to_version(self) -> int | None: ...
    @property
    def upserts(self) -> Upserts: ...
    @property
    def deleted_ids(self) -> np.ndarray: ...


def choose_form(adapter: KnowledgeAdapter, num_facts: int) -> Form:
    """The form that `auto` stands for."""
    is_small = adapter.config.kind == "paper" and num_facts <= MATERIALIZED_FACTS
    return "materialized" if is_small else "latent"


@dataclass(frozen=True, eq=False, repr=False)
class KnowledgeMemory:
    """The facts that an adapter attends to. Made by `from_embeddings`, and by the methods of another memory.

    Attributes:
        adapter: whose memory it is; another adapter refuses it.
        views: what is seen of each chunk; only chunks of which anything is seen.
        form: "latent" keeps base embeddings, "materialized" every KB layer's keys and values too.
        version: KB version of the facts, None where they come from no table.
        source: what tells the table that they come from apart from others, where it is known.
        num_total: facts of the whole knowledge base; of a selection too.
        device, dtype: of the embeddings.
        has_texts: facts can be looked up.
        is_selection: it holds a part of a knowledge base.
        is_auto: `form` follows the number of facts.
        priors: per view float32 [num_rows], added to the KB logits, -inf on hidden rows; None: no prior.
    """

    adapter: KnowledgeAdapter
    views: tuple[ChunkView, ...]
    form: Form
    version: int | None
    num_total: int
    device: torch.device
    dtype: torch.dtype
    has_texts: bool
    is_selection: bool = False
    is_auto: bool = False
    source: str | None = None
    priors: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def from_embeddings(
        cls,
        adapter: KnowledgeAdapter,
        keys_MP: np.ndarray | torch.Tensor,
        values_MP: np.ndarray | torch.Tensor,
        *,
        facts: Any = None,
        fact_ids: Any = None,
        form: str = "latent",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        version: int | None = None,
        source: str | None = None,
        chunk_rows: int | None = None,
    ) -> KnowledgeMemory:
        """A memory of M facts, M >= 0.

        Contiguous embeddings that have the dtype and are on the device already are not copied, nor are int64 ids: do
        not write to them afterwards.

        Args:
            keys_MP, values_MP: base embeddings of key and value texts, arrays or tensors [M, P] of float16, bfloat16,
                float32 or float64.
            facts: their texts, needed for citations: a pyarrow Table with entity, property, value and, if there is
                any, metadata and fact_id, or a list of such rows.
            fact_ids: int64 [M], each once; by default `facts`' fact_id, else 0 to M-1.
            form: "latent", "materialized", or "auto", see `choose_form`.
            dtype: what to keep the embeddings as; None: as they are.
            device: where to keep them; None: where the adapter is.
            version: KB version of the facts.
            source: see `KnowledgeMemory`.
            chunk_rows: facts per chunk; None: all in one, which is the cheapest to attend to. Smaller chunks are
                rewritten one by one when their facts are deleted, so that less memory is needed at a time.

        Raises:
            EmbeddingError: embeddings of another shape or type, or with numbers that are not finite.
            InputError: ids or facts that do not fit, an unknown form.
        """
        if form not in ("latent", "materialized", "auto"):
            raise InputError(f"there is no form {form!r} of a memory", help='"latent", "materialized" or "auto"')
        if chunk_rows is not None and chunk_rows < 1:
            raise InputError(f"a chunk cannot have {chunk_rows} rows", where="chunk_rows", help="give at least 1")
        device = adapter.device if device is None else torch.device(device)
        dim = adapter.config.dim
        whole = checked_chunk(dim, keys_MP, values_MP, facts, fact_ids, dtype=dtype, device=device, is_loaded=True)
        num_facts = whole.num_rows
        chunks = [whole] if chunk_rows is None or chunk_rows >= num_facts else split_chunk(whole, chunk_rows)
        return cls(
            adapter=adapter,
            views=tuple(ChunkView(chunk) for chunk in chunks if chunk.num_rows),
            form=choose_form(adapter, num_facts) if form == "auto" else form,  # type: ignore[arg-type]
            version=version,
            num_total=num_facts,
            device=whole.keys_MP.device,
            dtype=whole.keys_MP.dtype,
            has_texts=whole.facts is not None,
            is_auto=form == "auto",
            source=source,
        )

    def __repr__(self) -> str:
        of = f" of {self.num_total}" if self.is_selection else ""
        return f"KnowledgeMemory({self.num_facts}{of} facts, version {self.version}, {self.form}, {self.dtype})"

    @property
    def num_facts(self) -> int:
        """M: live facts that this memory holds."""
        return sum(view.num_live for view in self.views)

    @property
    def log_num_facts(self) -> float:
        """log M of the shift `log C - log M` (KBLaM, arXiv 2410.10450, eq. 11); 0 for an empty memory.

        After `select`, M is that of the whole knowledge base or of the selection, as the adapter says.
        """
        is_whole = self.is_selection and self.adapter.config.selection_log_m == "whole"
        return math.log(max(1, self.num_total if is_whole else self.num_facts))

    @property
    def fact_ids(self) -> np.ndarray:
        """Ids of the facts in memory's order, int64 [M]: view by view, rows ascending. Made at each call."""
        parts = [view.fact_ids for view in self.views]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    @property
    def facts_key(self) -> Hashable:
        """Equal for two memories that attend to the same facts in the same way but for their priors."""
        return tuple(view.serial for view in self.views), self.log_num_facts, self.form

    @property
    def nbytes(self) -> int:
        """Bytes kept alive by this memory: embeddings, ids, texts, positions, priors, and all that was derived so far.

        What is shared within it counts once; what it shares with other memories counts in each.
        """
        held = HeldBytes()
        self.add_to(held)
        return held.total()

    def add_to(self, held: HeldBytes) -> None:
        for view in self.views:
            view.add_to(held)
        for prior_M in self.priors or ():
            held.add_tensor(prior_M)

    def check_adapter(self, adapter: KnowledgeAdapter) -> None:
        """Raises AdapterMismatchError unless the memory was made for `adapter`."""
        if adapter is not self.adapter:
            raise AdapterMismatchError(
                "the memory was made for another adapter",
                help="make one with KnowledgeMemory.from_embeddings and the adapter that is attached",
            )

    def apply(self, changes: Changes) -> KnowledgeMemory:
        """The memory of `changes.to_version`, at a cost that grows with the changes and not with the facts.

        Untouched chunks are the same objects. Facts that are upserted or deleted are hidden in their old chunk, the
        new ones stand in a new chunk; `tiers` tells when chunks are merged or rewritten. A fact both deleted and
        upserted stands; deleting one that is not there changes nothing.

        Args:
            changes: `KnowledgeBase.changes(memory.version, ...)`, or anything like it.

        Raises:
            InputError: changes from another version, or this is a selection or has a prior.
            EmbeddingError: see `from_embeddings`.
        """
        self._check_can_apply(changes)
        upserts = changes.upserts
        if "fact_id" not in upserts.facts.column_names:
            raise InputError("the changed facts have no fact_id", help="give the table of a snapshot")
        new = checked_chunk(
            self.adapter.config.dim,
            upserts.key_embeddings_MP,
            upserts.value_embeddings_MP,
            upserts.facts if self.has_texts else None,
            upserts.facts["fact_id"],
            dtype=self.dtype,
            device=self.device,
            is_loaded=False,
        )
        gone_ids = np.concatenate([fact_texts.as_fact_ids(changes.deleted_ids), new.fact_ids])
        views = [view for view in (_without(view, gone_ids) for view in self.views) if view is not None]
        if new.num_rows:
            views.append(ChunkView(new))
        after = replace(self, views=consolidate(views, self.adapter), version=changes.to_version)
        num_facts = after.num_facts
        form = choose_form(self.adapter, num_facts) if self.is_auto else self.form
        return replace(after, num_total=num_facts, form=form)

    def select(self, fact_ids: Any) -> KnowledgeMemory:
        """A memory that sees only some of the facts, in the same chunks; a prior stays with its facts.

        Args:
            fact_ids: ids in any order; repeated ones count once.

        Raises:
            InputError: facts that this memory does not hold.
        """
        wanted = np.unique(fact_texts.as_fact_ids(fact_ids))
        views, priors = [], []
        missing = np.ones(len(wanted), bool)
        for at, view in enumerate(self.views):
            positions = view.find(wanted)
            missing &= positions < 0
            selected = view.only(np.sort(positions[positions >= 0]))
            if selected is not None:
                views.append(selected)
                if self.priors is not None:
                    priors.append(selected_prior(self.priors[at], view, selected))
        _check_none_missing(wanted[missing])
        return replace(
            self, views=tuple(views), priors=None if self.priors is None else tuple(priors), is_selection=True
        )

    def with_prior(self, prior_M: np.ndarray | torch.Tensor) -> KnowledgeMemory:
        """A memory with `prior_M` added to the KB logits of every layer and token; it replaces a prior there was.

        Args:
            prior_M: float [M], in the order of `fact_ids`; -inf hides a fact, which still counts in M.

        Raises:
            InputError: another length or type, NaN, or +inf.
        """
        return replace(self, priors=split_prior(prior_M, self.views, self.device))

    def without_prior(self) -> KnowledgeMemory:
        """The memory without its prior."""
        return replace(self, priors=None)

    def lookup(self, fact_ids: Any) -> list[dict[str, Any]]:
        """fact_id, entity, property, value and metadata of facts, in the order asked.

        Raises:
            InputError: facts that this memory does not hold, or it was made without texts.
        """
        wanted = fact_texts.as_fact_ids(fact_ids)
        if not self.has_texts:
            raise InputError("the memory was made without the facts' texts", help="give facts= when loading it")
        found: list[dict[str, Any] | None] = [None] * len(wanted)
        for view in self.views:
            positions = view.find(wanted)
            places = np.flatnonzero(positions >= 0)
            assert view.chunk.facts is not None
            rows = fact_texts.take(view.chunk.facts, positions[places]).to_pylist() if len(places) else []
            for place, row in zip(places.tolist(), rows, strict=True):
                found[place] = {"fact_id": int(wanted[place]), "metadata": None, **row}
        _check_none_missing(np.unique(wanted[[row is None for row in found]]))
        return [row for row in found if row is not None]

    def _check_can_apply(self, changes: Changes) -> None:
        if self.is_selection or self.priors is not None:
            made_by = "select" if self.is_selection else "with_prior"
            raise InputError(
                f"changes cannot be applied to what {made_by} made",
                help=f"apply them to the whole memory, then {made_by} again",
            )
        if self.version is not None and changes.from_version != self.version:
            raise InputError(
                f"the memory holds version {self.version}, the changes are those from version {changes.from_version}",
                help=f"ask for the changes from version {self.version}",
            )


def _without(view: ChunkView, fact_ids: np.ndarray) -> ChunkView | None:
    positions = view.find(fact_ids)
    # A fact may be named twice, as deleted and as upserted.
    positions = np.unique(positions[positions >= 0])
    return view.without(positions) if len(positions) else view


def _check_none_missing(missing_ids: np.ndarray) -> None:
    if len(missing_ids):
        raise InputError(
            "the memory does not hold all of the facts asked for",
            where=fact_texts.some(missing_ids),
            help="give ids of memory.fact_ids; a fact may have been deleted, or be outside of a selection",
        )
