"""The errors that kblam-ray raises on purpose: each says what happened, where, and what to do.

A job turns an error into its exit code and its one-line summary, a server into its HTTP body, so
each class carries a short stable `code` for programs and an `exit_code`: 2 where the caller can mend
the input or the settings, 1 where the machinery failed (a store that is down, a worker that died).
"""

from __future__ import annotations


class KblamError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: what happened, a sentence without a full stop.
        where: the file, row, fact, table or setting concerned.
        help: what the reader can do about it.
    """

    code = "error"
    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, help: str) -> None:
        self.what, self.where, self.help = what, where, help
        place = f" ({where})" if where else ""
        super().__init__(f"{what}{place}. Help: {help}")

    def __reduce__(self):
        # Exceptions cross process borders in Ray; keyword-only arguments need this to unpickle.
        return (_rebuild, (type(self), self.what, self.where, self.help))


def _rebuild(cls: type[KblamError], what: str, where: str | None, help: str) -> KblamError:
    return cls(what, where=where, help=help)


class InputError(KblamError):
    """The caller's input or settings are wrong."""

    code = "bad_input"
    exit_code = 2


class BadRowError(InputError):
    """A row of an input file is not a fact; `where` names file and row."""

    code = "bad_row"


class FactIdCollisionError(InputError):
    """Two different identities share one `fact_id`."""

    code = "fact_id_collision"


class MissingDependencyError(InputError):
    """An optional package is needed and not installed."""

    code = "missing_dependency"


class EncoderError(KblamError):
    """A sentence encoder could not be loaded or did not answer."""

    code = "encoder_failed"


class EncoderNotFoundError(InputError):
    """No encoder by that name can be had here."""

    code = "encoder_not_found"


class EncoderAuthenticationError(InputError):
    """A remote encoder refused the credentials."""

    code = "encoder_unauthorized"


class EncoderQuotaError(EncoderError):
    """The account of a remote encoder has no quota left."""

    code = "encoder_quota_exhausted"


class EncoderMismatchError(InputError):
    """A table or an adapter was made with another encoder."""

    code = "encoder_mismatch"


class TableError(InputError):
    """The table is not one of ours, or lacks what was asked of it."""

    code = "bad_table"


class TableNotFoundError(TableError):
    """There is no table at the URI, or it lacks the version."""

    code = "table_not_found"


class StorageError(KblamError):
    """A local disk or an object store cannot be read or written."""

    code = "storage_failed"


class RayStartError(KblamError):
    """Ray could not be started or its cluster could not be reached."""

    code = "ray_unavailable"


class ChatError(KblamError):
    """A chat endpoint did not answer."""

    code = "chat_failed"


class ChatAnswerError(ChatError):
    """A chat model answered, and none of its answers has the form that was asked for."""

    code = "chat_answer_invalid"


class ChatAuthenticationError(InputError):
    """A chat endpoint refused the credentials."""

    code = "chat_unauthorized"


class ChatQuotaError(ChatError):
    """The account of a chat endpoint has no quota left."""

    code = "chat_quota_exhausted"


class DocumentError(InputError):
    """A document cannot be read: damaged, encrypted, empty or in another encoding than it says."""

    code = "bad_document"


class DataFileGoneError(StorageError):
    """A data file that a version of a table names is not there any more, most likely vacuumed."""

    code = "data_file_gone"


class AdapterError(InputError):
    """An adapter's folder, checkpoint or configuration cannot be used: damaged, incomplete, of a newer format."""

    code = "bad_adapter"


class AdapterMismatchError(InputError):
    """An adapter was made for another base model or encoder, or a memory for another adapter."""

    code = "adapter_mismatch"


class UnsupportedModelError(InputError):
    """A base model's attention has something that knowledge attention cannot be merged with."""

    code = "unsupported_model"


class EmbeddingError(InputError):
    """Embeddings have another shape than the adapter reads, or numbers that are not finite."""

    code = "bad_embeddings"


class GenerationError(KblamError):
    """The base model's engine failed while it wrote an answer."""

    code = "generation_failed"


class EvaluationError(KblamError):
    """The workers that evaluate died more often than they are started again."""

    code = "evaluation_failed"


class TrainingError(KblamError):
    """A training cannot start, go on or be resumed."""

    code = "training_failed"


class NotServedError(InputError):
    """No model, knowledge base or fact of that name is served here."""

    code = "not_found"


class ConflictError(InputError):
    """The request is right, but not for what is served now: a write to a pinned version, a version not reached yet."""

    code = "conflict"


class TooLargeError(InputError):
    """A request is larger than the server takes."""

    code = "too_large"


class ContextLengthError(InputError):
    """Prompt and answer are longer than the base model or the engine's cache has room for."""

    code = "context_length_exceeded"


class UnsupportedParameterError(InputError):
    """A parameter of the OpenAI schema that is not supported, or not with this value."""

    code = "unsupported_parameter"


class AuthenticationError(InputError):
    """No key, or an unknown one."""

    code = "invalid_api_key"


class PermissionDeniedError(InputError):
    """The key is right, but not for this."""

    code = "permission_denied"


class OverloadedError(KblamError):
    """As many requests wait as the server lets wait; ask again later."""

    code = "overloaded"


class UnavailableError(KblamError):
    """What must answer cannot do so now: no replica, or none in time."""

    code = "unavailable"


class NotServedInTimeError(UnavailableError):
    """A change is made and durable, and not every replica serves it yet."""

    code = "not_served_in_time"

    def __init__(self, kb_version: int, timeout_s: float) -> None:
        super().__init__(
            f"after {timeout_s:g} s not every replica serves version {kb_version}",
            help="the change stands: do not repeat it; GET the knowledge base to see its version",
        )
        self.kb_version = kb_version
