"""Continuous batching of transformers, every request with its own knowledge.

The library's engine packs the tokens of many requests into one row; `cu_seq_lens_q` says where each begins, and the
engine's list of scheduled requests whose they are. The base model's hook asks here which memory each of them attends
to: not through a context variable, because the engine computes in a thread of its own.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.batch import Segment
from kblam_ray.attention.batching_parts import Choose, Chooser, Outputs, tokens_that_fit
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import GenerationError, InputError, UnsupportedModelError

CPU_NUM_BLOCKS, CPU_MAX_BATCH_TOKENS = 64, 512
"""Sizes of the paged cache on a CPU, where the library's own sizing claims most of the memory."""

EXACTNESS = {
    # Cached prefixes are shared by token ids alone: another knowledge base would get the first one's answer.
    "allow_block_sharing": False,
    # Flash kernels, graphs and double buffering bypass the attention function or its per-request state.
    "auto_switch_to_flash": False,
    "use_async_batching": False,
    "use_cuda_graph": False,
    # Compiled steps are padded: they have more sequences than requests.
    "varlen_compile_config": None,
    "decode_compile_config": None,
    "default_compile_level": 0,
}
"""Settings of the library's engine under which every request sees its own knowledge."""

CHILD = "__child#"
"""What the library puts between a request's name and the number of a further answer to it."""


@dataclass
class _Request:
    """A request that has not ended.

    Attributes:
        remaining: answers that are still to come.
        is_fetched: they are by `get_result`.
    """

    memory: KnowledgeMemory | None
    remaining: int
    is_fetched: bool
    is_cancelled: bool = False


class KnowledgeBatching:
    """One engine over one base model: requests join and leave between steps, each with a memory of its own.

    Use as a context manager; inside it, requests may be added from any thread.

    Args:
        attachment: of an adapter to the base model, whose attention implementation is "sdpa".
        generation_config: of all requests (greedy or sampling); the model's own by default.
        config: of the library's engine; what `EXACTNESS` names is set whatever it says.
        choose: changes the logits that tokens are chosen by, request by request.
    """

    def __init__(
        self,
        attachment: Attachment,
        generation_config: GenerationConfig | None = None,
        config: ContinuousBatchingConfig | None = None,
        choose: Choose | None = None,
    ) -> None:
        model: Any = attachment.base_model
        implementation = model.config._attn_implementation
        if implementation != "sdpa":
            raise UnsupportedModelError(
                f"continuous batching with knowledge over the attention implementation {implementation!r}",
                where=type(model).__name__,
                help='load the base model with attn_implementation="sdpa"',
            )
        if config is None:
            config = ContinuousBatchingConfig()
            if model.device.type == "cpu":
                config = replace(config, num_blocks=CPU_NUM_BLOCKS, max_batch_tokens=CPU_MAX_BATCH_TOKENS)
        settings: dict[str, Any] = EXACTNESS
        self._attachment, self._model = attachment, model
        self._generation_config = generation_config
        self._config = replace(config, **settings)
        self._choose = choose
        self._requests: dict[str, _Request] = {}
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._manager: Any = None
        self._thread: threading.Thread | None = None
        self._capacity = 0

    def __enter__(self) -> Self:
        if getattr(self._attachment.base_model, "_cached_continuous_batching_manager", None) is not None:
            raise InputError(
                "the base model keeps an engine of its own, which would be used instead",
                where="KnowledgeBatching",
                help="call destroy_cached_continuous_batching_manager() of the base model first",
            )
        self._open.enter_context(self._attachment.packed(self))
        try:
            manager = self._model.init_continuous_batching(self._generation_config, self._config)
            manager.output_router.output_queue = Outputs(self._is_fetched)
            if self._choose is not None:
                manager.logit_processor.logits_processor.append(Chooser(manager, self._choose))
                manager.logit_processor.do_processing = True
            manager.warmup()
            self._capacity = tokens_that_fit(manager.batch_processor.cache)
            manager.start()
        except BaseException:
            self._open.close()
            raise
        self._manager, self._thread = manager, manager._generation_thread
        return self

    def __exit__(self, *error: Any) -> None:
        manager, self._manager = self._manager, None
        if manager.is_running():
            manager.stop(block=True)
        manager.destroy()
        self._open.close()
        self._requests.clear()

    def abort(self) -> None:
        """Stop without answering what is asked: requests in work fail. Waits for the step at work.

        A request that the engine has not looked at yet may hear nothing: whoever waits for it shall `join`, too.
        """
        manager = self.manager
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)

    def join(self) -> None:
        """Wait until the engine's thread has ended, for whatever reason."""
        if self._thread is not None:
            self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether the engine takes and answers requests; False after an error in its thread."""
        manager = self._manager
        return (
            manager is not None
            and manager.is_running()
            and manager.background_thread_status.can_accept_new_requests() is None
        )

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer of the longest request that the cache holds; the last one is not counted."""
        return self._capacity

    @property
    def manager(self) -> Any:
        """The library's engine, for what is not about knowledge: streaming, cancelling, pausing."""
        if self._manager is None:
            raise InputError("the engine is not running", where="KnowledgeBatching", help="enter its context first")
        return self._manager

    def add_request(
        self,
        input_ids: Sequence[int],
        knowledge: KnowledgeMemory | None = None,
        *,
        request_id: str | None = None,
        on_output: Callable[[GenerationOutput], None] | None = None,
        **options: Any,
    ) -> str:
        """Queue a prompt that attends to `knowledge`, to no facts without it.

        Args:
            input_ids: token ids of the prompt.
            knowledge: stays in use until the request ends, whatever is loaded meanwhile.
            request_id: unique; made up by default.
            on_output: called with the request's outputs in the event loop that runs in this thread, instead of
                `get_result`; not any more after `cancel`. It must not raise.
            **options: of the library's `add_request`: max_new_tokens, streaming, eos_token_id.

        Returns:
            The request's id, which its results carry.

        Raises:
            InputError: the id is in use, the prompt is empty or does not fit in the cache with its answer, or the
                engine does not take requests any more.
            AdapterMismatchError: the memory's adapter is not attached to the base model.
        """
        # All of it here: in the engine's thread, a request that cannot be answered would end all the others.
        self._attachment.check(knowledge)
        self._check_length(len(input_ids), options.get("max_new_tokens"))
        request_id = request_id or uuid.uuid4().hex
        with self._lock:
            if request_id in self._requests:
                raise InputError("a request of that id is running", where=request_id, help="give another request_id")
            self._requests[request_id] = _Request(knowledge, self.manager.num_return_sequences, on_output is None)
        if on_output is not None:
            self._listen(request_id, on_output)
        if self.manager.add_request(list(input_ids), request_id=request_id, **options) is None:
            self._requests.pop(request_id, None)
            self._unlisten(self.manager, request_id)
            raise InputError("the engine takes no more requests", where=request_id, help="start another engine")
        return request_id

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next output, of one request or of any; None when none came within `timeout` seconds."""
        output = self.manager.get_result(request_id=request_id, timeout=timeout)
        if output is not None and output.is_finished():
            self._answered(output.request_id)
        return output

    def cancel(self, request_id: str) -> None:
        """End a request; what it would have said next is not computed, and its memory is let go now."""
        manager = self._manager
        if manager is None:  # stopped meanwhile, and nothing is left of its requests
            return
        for name in self._answer_ids(manager, request_id):
            manager.cancel_request(name)
        self._unlisten(manager, request_id)
        # Marked after the engine knows: at most the step that it is preparing has the request in it.
        with self._lock:
            if request_id in self._requests:
                self._requests[request_id].is_cancelled = True
                self._requests[request_id].memory = None

    def generate(
        self, prompts: Sequence[Sequence[int]], knowledge: Sequence[KnowledgeMemory | None], **options: Any
    ) -> list[list[int]]:
        """Token ids generated for each prompt with its own knowledge, in the order given.

        Where the configuration asks for several answers to a prompt, they stand beside each other. It takes results
        from the queue that `get_result` reads: use one or the other.

        Raises:
            InputError: another number of memories than prompts, or see `add_request`.
            GenerationError: a request failed, or the engine stopped.
        """
        if len(prompts) != len(knowledge):
            raise InputError(
                f"{len(prompts)} prompts and {len(knowledge)} knowledge memories",
                where="knowledge",
                help="give one memory or None per prompt",
            )
        ids: list[str] = []
        answers: dict[str, list[int]] = {}
        try:
            for prompt, memory in zip(prompts, knowledge, strict=True):
                ids.append(self.add_request(prompt, memory, **options))
            wanted = [name for request_id in ids for name in self._answer_ids(self.manager, request_id)]
            while len(answers) < len(wanted):
                output = self.get_result(timeout=1)
                if output is None:
                    self._check_running()
                elif output.error is not None:
                    raise GenerationError(
                        output.error, where=output.request_id, help="see the cause in the engine's log"
                    )
                elif output.request_id in wanted and output.is_finished():
                    answers[output.request_id] = output.generated_tokens
        except InputError:
            for request_id in ids:
                self.cancel(request_id)
            raise
        return [answers[name] for name in wanted]

    def segments(self, inputs: dict[str, Any]) -> list[Segment] | None:
        """What the sequences of a packed batch attend to; None for a batch that is not this engine's."""
        processor = getattr(self._manager, "batch_processor", None)
        if processor is None or inputs.get("cache") is not processor.cache:
            return None
        bounds = inputs["cu_seq_lens_q"].tolist()
        scheduled = [request.state.request_id for request in processor.inputs_and_outputs.requests_in_batch]
        with self._lock:
            running = {_first(request_id) for request_id in scheduled}
            for request_id in [name for name, request in self._requests.items() if request.is_cancelled]:
                if request_id not in running:
                    del self._requests[request_id]
            requests = [self._requests.get(_first(request_id)) for request_id in scheduled]
        for request_id, request in zip(scheduled, requests, strict=True):
            # The engine looks for new requests, then for cancelled ones: who came and went in between is new to it.
            if request is None or request.is_cancelled:
                self.manager.cancel_request(request_id)
        memories = [request.memory if request is not None else None for request in requests]
        return [
            Segment(memory, start, stop) for memory, start, stop in zip(memories, bounds[:-1], bounds[1:], strict=True)
        ]

    @staticmethod
    def _answer_ids(manager: Any, request_id: str) -> list[str]:
        """What the library calls the answers to a request: the first has the request's name."""
        return [request_id, *(f"{request_id}{CHILD}{place}" for place in range(manager.num_return_sequences - 1))]

    def _listen(self, request_id: str, on_output: Callable[[GenerationOutput], None]) -> None:
        def take(output: GenerationOutput) -> None:
            if output.is_finished():
                self._answered(request_id)
            on_output(output)

        for name in self._answer_ids(self.manager, request_id):
            self.manager.register_result_handler(name, take)

    def _unlisten(self, manager: Any, request_id: str) -> None:
        router = manager.output_router
        with router._lock:
            for name in self._answer_ids(manager, request_id):
                router.result_handlers.pop(name, None)

    def _check_length(self, num_tokens: int, max_new_tokens: int | None) -> None:
        if max_new_tokens is None:
            max_new_tokens = self.manager.generation_config.max_new_tokens or 1
        # The last token of an answer is not read again.
        needed = num_tokens + max_new_tokens - 1
        if num_tokens and needed <= self._capacity:
            return
        raise InputError(
            f"a prompt of {num_tokens or 'no'} tokens and an answer of {max_new_tokens}, where {self._capacity} fit in",
            where="input_ids",
            help="give a prompt, ask for fewer tokens, or give the engine's configuration more num_blocks",
        )

    def _check_running(self) -> None:
        if not self.manager.is_running():
            raise GenerationError("the engine stopped", where="KnowledgeBatching", help="its log says why")

    def _is_fetched(self, request_id: str) -> bool:
        with self._lock:
            request = self._requests.get(_first(request_id))
            return request is not None and request.is_fetched and not request.is_cancelled

    def _answered(self, request_id: str) -> None:
        with self._lock:
            request = self._requests.get(_first(request_id))
            if request is not None:
                request.remaining -= 1
                if request.remaining <= 0:
                    del self._requests[_first(request_id)]


def _first(request_id: str) -> str:
    """Further answers to one prompt are requests of the library's own making, named after the first."""
    return request_id.partition(CHILD)[0]
