"""Continuous batching answers every request as `generate` does, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from families import FAMILIES, VOCABULARY, Facts, Family, attached, random_adapter
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.requests import GenerationOutput

from kblam_ray.attention import Attachment, KnowledgeBatching, KnowledgeMemory
from kblam_ray.attention.batch import Segment
from kblam_ray.errors import AdapterMismatchError, GenerationError, InputError, UnsupportedModelError

NEW_TOKENS = 5
PATIENCE_S = 60
"""Longest wait for an output; reached only where something is wrong."""

LLAMA = FAMILIES[0]
PROMPTS = torch.randint(2, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(8)).tolist()


def cache(**settings: Any) -> ContinuousBatchingConfig:
    """A small cache whose pages are shorter than the prompts, so that they could be shared."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 96, "max_batch_tokens": 64, **settings})


def greedy(**settings: Any) -> GenerationConfig:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**{**options, **settings})


class Watched(KnowledgeBatching):
    """An engine that remembers its batches."""

    batches: list[list[Segment]]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.batches = []

    def segments(self, inputs: dict[str, Any]) -> list[Segment] | None:
        found = super().segments(inputs)
        if found is not None:
            self.batches.append(found)
        return found


def engine_of(attachment: Attachment, config: ContinuousBatchingConfig | None = None, **settings: Any) -> Watched:
    return Watched(attachment, greedy(**settings), config or cache())


def alone(
    attachment: Attachment, prompt: Sequence[int], memory: KnowledgeMemory | None, num_tokens: int = NEW_TOKENS
) -> list[int]:
    """What `generate` answers to one prompt."""
    input_ids = torch.tensor([prompt])
    with attachment.using(memory):
        generated = attachment.base_model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=num_tokens, do_sample=False
        )
    return generated[0, len(prompt) :].tolist()


def all_alone(attachment: Attachment, prompts: Sequence, memories: Sequence) -> list[list[int]]:
    answers = [alone(attachment, *request) for request in zip(prompts, memories, strict=True)]
    assert len({tuple(answer) for answer in answers}) > 1, "all answers are the same: this shows nothing"
    return answers


def upserted(memory: KnowledgeMemory, facts: Facts, fact_ids: Sequence[int], deleted: Sequence[int]) -> KnowledgeMemory:
    """The next version of a memory."""
    upserts = SimpleNamespace(
        facts=pa.table({"fact_id": pa.array(fact_ids, pa.int64())}),
        key_embeddings_MP=facts.keys_MP.numpy(),
        value_embeddings_MP=facts.values_MP.numpy(),
    )
    changes = SimpleNamespace(
        from_version=memory.version,
        to_version=(memory.version or 0) + 1,
        upserts=upserts,
        deleted_ids=np.array(deleted, np.int64),
    )
    return memory.apply(changes)


@pytest.fixture(autouse=True)
def _quiet_library(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="ContinuousBatchingLogger")


@pytest.fixture(params=["paper", "shared"])
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = LLAMA.model()
    with attached(model, random_adapter(model.config, request.param, LLAMA.kb_layers, kb_scale=5.0)) as attachment:
        yield attachment


@pytest.fixture
def paper() -> Iterator[Attachment]:
    """Attached to a Llama, for what does not depend on the kind."""
    model = LLAMA.model()
    with attached(model, random_adapter(model.config, "paper", LLAMA.kb_layers, kb_scale=5.0)) as attachment:
        yield attachment


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_answers_as_generate_does(family: Family):
    model = family.model()
    adapters = [random_adapter(model.config, kind, family.kb_layers, kb_scale=5.0) for kind in ("paper", "shared")]
    memories: list[KnowledgeMemory | None] = [None]
    for adapter in adapters:
        memories += [
            Facts.random(7, seed=1).memory(adapter),
            Facts.random(5, seed=2, has_prior=True).memory(adapter),
            Facts.random(7, seed=1).memory(adapter, form="materialized"),
        ]
    prompts = [PROMPTS[1][:4], *[PROMPTS[0], PROMPTS[2][:7], PROMPTS[0]] * 2]
    with attached(model, *adapters) as attachment:
        expected = all_alone(attachment, prompts, memories)
        assert alone(attachment, PROMPTS[0], None) not in expected
        with engine_of(attachment) as engine:
            assert engine.generate(prompts, memories) == expected


def test_five_knowledge_bases_versions_priors_and_selections_in_one_batch(attachment: Attachment):
    adapter = attachment.adapter
    first = Facts.random(20, seed=1).memory(adapter, version=3, chunk_rows=8)
    second = upserted(first, Facts.random(4, seed=2), fact_ids=[2, 3, 30, 31], deleted=[0, 1, 19])
    memories = [
        Facts.random(6, seed=3).memory(adapter),
        first,
        second,
        second.with_prior(3 * torch.randn(second.num_facts, generator=torch.Generator().manual_seed(4))),
        first.select([4, 5, 17]),
    ]
    # One prompt for all: nothing but what each attends to tells them apart.
    prompts = [PROMPTS[0]] * 5
    expected = all_alone(attachment, prompts, memories)
    with engine_of(attachment) as engine:
        with engine.manager.pause():
            ids = [engine.add_request(*request) for request in zip(prompts, memories, strict=True)]
        answers = collect(engine, ids)
    assert [answers[request_id] for request_id in ids] == expected
    assert [segment.memory for segment in engine.batches[0]] == memories
    assert all(len(batch) == 5 for batch in engine.batches)


def test_the_same_prompt_with_the_knowledge_changed_in_between(attachment: Attachment):
    before = Facts.random(9, seed=1).memory(attachment.adapter, version=0)
    after = upserted(before, Facts.random(3, seed=2), fact_ids=[0, 1, 2], deleted=[7, 8])
    memories = [before, after, None, before, None, after]
    expected = all_alone(attachment, [PROMPTS[0]] * 6, memories)
    assert len({tuple(answer) for answer in expected}) == 3
    with engine_of(attachment) as engine:
        # One after the other: a page of the cache that is complete could be found again by its token ids.
        for memory, answer in zip(memories, expected, strict=True):
            assert engine.generate([PROMPTS[0]], [memory]) == [answer]


def test_requests_join_and_leave_while_others_run(attachment: Attachment):
    memories = [Facts.random(7, seed=seed).memory(attachment.adapter) for seed in (1, 2, 3)]
    lengths = [30, 8, 3]
    with engine_of(attachment) as engine:
        ids = [engine.add_request(PROMPTS[0], memories[0], max_new_tokens=lengths[0], streaming=True)]
        answers: dict[str, list[int]] = {}
        while len(answers) < 3:
            output = engine.get_result(timeout=PATIENCE_S)
            assert output is not None
            if len(ids) < 3:
                # The long one has begun to answer.
                prompt, memory = PROMPTS[len(ids)], memories[len(ids)]
                ids.append(engine.add_request(prompt, memory, max_new_tokens=lengths[len(ids)]))
            if output.is_finished():
                answers[output.request_id] = output.generated_tokens
    for row, request_id in enumerate(ids):
        assert answers[request_id] == alone(attachment, PROMPTS[row], memories[row], lengths[row])
    assert {len(batch) for batch in engine.batches} > {1}


def test_a_prompt_longer_than_a_batch_is_read_in_parts(attachment: Attachment):
    prompt = torch.randint(2, VOCABULARY, (50,), generator=torch.Generator().manual_seed(9)).tolist()
    memories = [Facts.random(7, seed=1).memory(attachment.adapter), Facts.random(3, seed=2).memory(attachment.adapter)]
    prompts = [prompt, PROMPTS[1]]
    expected = all_alone(attachment, prompts, memories)
    with engine_of(attachment, cache(max_batch_tokens=16)) as engine:
        assert engine.generate(prompts, memories) == expected
    assert max(batch[-1].stop for batch in engine.batches) <= 16


def test_requests_that_are_put_back_for_want_of_room_go_on_with_their_knowledge(attachment: Attachment):
    memories = [Facts.random(7, seed=row).memory(attachment.adapter) for row in range(4)]
    expected = [alone(attachment, PROMPTS[0], memory, 14) for memory in memories]
    # Room for two of the four requests of 22 tokens, although all four may begin.
    with engine_of(attachment, cache(num_blocks=13)) as engine:
        assert engine.generate([PROMPTS[0]] * 4, memories, max_new_tokens=14) == expected
        prefills = [segment for batch in engine.batches for segment in batch if segment.stop - segment.start > 1]
    assert len(prefills) > 4, "no request was put back: this shows nothing"


def test_several_answers_to_a_prompt_share_its_knowledge(attachment: Attachment):
    memories = [
        Facts.random(7, seed=1).memory(attachment.adapter),
        None,
        Facts.random(7, seed=2).memory(attachment.adapter),
    ]
    expected = all_alone(attachment, PROMPTS[:3], memories)
    # With one candidate per token every sample is the greedy answer.
    with engine_of(attachment, do_sample=True, top_k=1, num_return_sequences=3) as engine:
        answers = engine.generate(PROMPTS[:3], memories)
        assert answers == [answer for answer in expected for _ in range(3)]
        assert engine.generate(PROMPTS[:1], memories[:1]) == [expected[0]] * 3


def test_requests_from_many_threads(attachment: Attachment):
    memories = [Facts.random(4 + row, seed=row).memory(attachment.adapter) for row in range(4)] + [None]
    expected = all_alone(attachment, PROMPTS, memories)
    ids: dict[int, str] = {}
    with engine_of(attachment) as engine:

        def add(row: int) -> None:
            ids[row] = engine.add_request(PROMPTS[row], memories[row])

        threads = [threading.Thread(target=add, args=(row,)) for row in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = collect(engine, list(ids.values()))
    assert [answers[ids[row]] for row in range(5)] == expected


def test_the_model_answers_other_callers_while_its_engine_runs(attachment: Attachment):
    memory, other = (Facts.random(7, seed=seed).memory(attachment.adapter) for seed in (1, 2))
    expected = alone(attachment, PROMPTS[1], other)
    expected_without = alone(attachment, PROMPTS[1], None)
    long = alone(attachment, PROMPTS[0], memory, 40)
    with engine_of(attachment) as engine:
        request_id = engine.add_request(PROMPTS[0], memory, max_new_tokens=40)
        for _ in range(5):
            assert alone(attachment, PROMPTS[1], other) == expected
            assert alone(attachment, PROMPTS[1], None) == expected_without
        assert collect(engine, [request_id])[request_id] == long
    assert alone(attachment, PROMPTS[1], None) == expected_without


def test_engines_on_two_models_and_two_engines_on_one(paper: Attachment):
    gemma = next(family for family in FAMILIES if family.name == "gemma3")
    model = gemma.model()
    with attached(model, random_adapter(model.config, "shared", gemma.kb_layers, kb_scale=5.0)) as other:
        attachments = [paper, other, paper]
        memories = [Facts.random(7, seed=row).memory(one.adapter) for row, one in enumerate(attachments)]
        expected = [alone(one, PROMPTS[0], memory) for one, memory in zip(attachments, memories, strict=True)]
        with engine_of(paper) as first, engine_of(other) as second, engine_of(paper) as third:
            engines = [first, second, third]
            ids = [engine.add_request(PROMPTS[0], memory) for engine, memory in zip(engines, memories, strict=True)]
            answers = [collect(engine, [name])[name] for engine, name in zip(engines, ids, strict=True)]
        assert answers == expected


def test_settings_under_which_knowledge_would_be_lost_are_overridden(attachment: Attachment):
    config = cache(
        allow_block_sharing=True,
        auto_switch_to_flash=True,
        use_async_batching=True,
        use_cuda_graph=True,
        varlen_compile_config=CompileConfig(),
        decode_compile_config=CompileConfig(),
        default_compile_level=2,
    )
    memories = [Facts.random(7, seed=1).memory(attachment.adapter), Facts.random(7, seed=2).memory(attachment.adapter)]
    expected = all_alone(attachment, [PROMPTS[0]] * 2, memories)
    with engine_of(attachment, config) as engine:
        used = engine.manager.continuous_batching_config
        assert not (used.allow_block_sharing)
        assert not (used.auto_switch_to_flash)
        assert not (used.use_async_batching)
        assert not any(used.cuda_graph_booleans)
        assert used.varlen_compile_config is None
        assert used.decode_compile_config is None
        assert attachment.base_model.config._attn_implementation == "sdpa"
        for memory, answer in zip(memories, expected, strict=True):
            assert engine.generate([PROMPTS[0]], [memory]) == [answer]
    assert config.allow_block_sharing, "the caller's settings are the caller's"


def test_a_cancelled_request_says_nothing_more_and_frees_its_memory(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    kept = Facts.random(7, seed=2).memory(paper.adapter)
    expected = alone(paper, PROMPTS[1], kept)
    with engine_of(paper) as engine:
        engine.add_request(PROMPTS[0], memory, request_id="long", max_new_tokens=300, streaming=True)
        assert engine.get_result(timeout=PATIENCE_S).request_id == "long"
        engine.cancel("long")
        engine.cancel("never there")
        answers = collect(engine, [engine.add_request(PROMPTS[1], kept)])
        assert list(answers.values()) == [expected]
        engine.batches.clear()
        engine.generate([PROMPTS[1]], [kept])
        assert all(len(batch) == 1 for batch in engine.batches)
        engine.batches.clear()
        gone = weakref.ref(memory)
        del memory
        gc.collect()
        assert gone() is None
        # The name is free again.
        engine.add_request(PROMPTS[1], kept, request_id="long")
        assert collect(engine, ["long"])["long"] == expected


def test_a_request_cancelled_before_it_began_leaves_nothing(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    with engine_of(paper) as engine:
        with engine.manager.pause():
            engine.add_request(PROMPTS[0], memory, request_id="a")
            engine.cancel("a")
        assert engine.generate([PROMPTS[1]], [None]) == [alone(paper, PROMPTS[1], None)]
        assert all(segment.memory is None for batch in engine.batches for segment in batch)
        gone = weakref.ref(memory)
        del memory
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_request_that_comes_and_goes_between_two_looks_of_the_engine(
    paper: Attachment, monkeypatch: pytest.MonkeyPatch, is_busy: bool
):
    expected = alone(paper, PROMPTS[1], None)
    with engine_of(paper) as engine:
        cancelled, drain, names = engine.manager.cancel_queue, continuous_api.drain_queue, iter(["gone"])

        def looked_at(queue: Any) -> list[Any]:
            if queue is cancelled and (name := next(names, None)) is not None:
                engine.add_request(PROMPTS[0], None, request_id=name, max_new_tokens=300)
                engine.cancel(name)
            return drain(queue)

        with engine.manager.pause():
            if is_busy:
                engine.add_request(PROMPTS[1], None, request_id="kept")
            monkeypatch.setattr(continuous_api, "drain_queue", looked_at)
        if is_busy:
            assert collect(engine, ["kept"])["kept"] == expected
        assert engine.generate([PROMPTS[1]], [None]) == [expected]
        # What was cancelled was not written to its end.
        assert engine.manager.batch_processor.scheduler.active_requests.keys() <= {"gone"}
        assert engine.generate([PROMPTS[1]], [None]) == [expected]
        assert not engine.manager.batch_processor.scheduler.has_pending_requests()
        assert not engine._requests


def test_answers_of_a_cancelled_prompt_stop_together(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    with engine_of(paper, do_sample=True, num_return_sequences=3) as engine:
        engine.add_request(PROMPTS[0], memory, request_id="a", max_new_tokens=200, streaming=True)
        while len(engine.batches[-1]) < 3 if engine.batches else True:
            assert engine.get_result(timeout=PATIENCE_S) is not None
        engine.cancel("a")
        engine.generate([PROMPTS[1]], [None])
        engine.batches.clear()
        engine.generate([PROMPTS[1]], [None])
        assert all(segment.memory is None for batch in engine.batches for segment in batch)


def test_finished_requests_free_their_memory(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    with engine_of(paper) as engine:
        engine.generate([PROMPTS[0]], [memory])
        engine.generate([PROMPTS[0]], [None])
        engine.batches.clear()
        gone = weakref.ref(memory)
        del memory
        gc.collect()
        assert gone() is None


def test_only_sdpa_can_batch_with_knowledge():
    model = LLAMA.model(implementation="eager")
    adapter = random_adapter(model.config, "paper", LLAMA.kb_layers)
    with attached(model, adapter) as attachment, pytest.raises(UnsupportedModelError, match="'eager'"):
        KnowledgeBatching(attachment)
    assert model.config._attn_implementation == "eager"


def test_an_engine_that_the_model_keeps_is_not_used_in_silence(paper: Attachment):
    model = paper.base_model
    settings = {"generation_config": greedy(), "continuous_batching_config": cache(auto_switch_to_flash=False)}
    # Kept by the library with its own settings: cached prefixes are shared in it.
    with model.continuous_batching_context_manager(**settings, persistent_manager=True):
        pass
    with pytest.raises(InputError, match="engine of its own"), engine_of(paper):
        pass
    model.destroy_cached_continuous_batching_manager()
    with engine_of(paper) as engine:
        assert engine.generate(PROMPTS[:1], [None]) == [alone(paper, PROMPTS[0], None)]


def test_requests_that_cannot_be_answered_are_refused_and_the_others_are_answered(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    stranger = Facts.random(7).memory(random_adapter(paper.base_model.config, "shared", (0, 1)))
    expected = alone(paper, PROMPTS[0], memory, 20)
    with engine_of(paper, cache(num_blocks=8)) as engine:
        engine.add_request(PROMPTS[0], memory, request_id="good", max_new_tokens=20)
        with pytest.raises(InputError, match="id is running"):
            engine.add_request(PROMPTS[1], request_id="good")
        with pytest.raises(AdapterMismatchError, match="not attached"):
            engine.add_request(PROMPTS[1], stranger)
        with pytest.raises(InputError, match="no tokens"):
            engine.add_request([], memory)
        with pytest.raises(InputError, match="tokens"):
            engine.add_request(PROMPTS[1] * 40, memory)
        with pytest.raises(InputError, match="2 prompts"):
            engine.generate(PROMPTS[:2], [memory])
        assert collect(engine, ["good"])["good"] == expected


def test_an_adapter_stays_on_while_an_engine_answers_with_it(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    expected = alone(paper, PROMPTS[0], memory)
    with engine_of(paper) as engine:
        with pytest.raises(InputError, match="engine"):
            paper.detach()
        assert engine.generate([PROMPTS[0]], [memory]) == [expected]
    paper.detach()


def test_an_engine_that_is_not_running_takes_no_requests(paper: Attachment):
    engine = engine_of(paper)
    with pytest.raises(InputError, match="not running"):
        engine.add_request(PROMPTS[0])
    with engine:
        engine.generate(PROMPTS[:1], [None])
    with pytest.raises(InputError, match="not running"):
        engine.add_request(PROMPTS[0])
    with engine:
        assert engine.generate(PROMPTS[:1], [None]) == [alone(paper, PROMPTS[0], None)]


def test_a_failing_engine_says_so(paper: Attachment, monkeypatch: pytest.MonkeyPatch):
    with engine_of(paper) as engine:
        monkeypatch.setattr(engine, "segments", lambda inputs: [][0])
        with pytest.raises(GenerationError, match="list index"):
            engine.generate(PROMPTS[:1], [None])
        with pytest.raises(InputError, match="no more requests"):
            engine.generate(PROMPTS[:1], [None])


def test_outputs_come_to_the_event_loop_and_let_the_memory_go(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    expected = alone(paper, PROMPTS[0], memory)
    gone = weakref.ref(memory)

    async def ask(engine: Watched, knowledge: KnowledgeMemory, *, streaming: bool) -> list[GenerationOutput]:
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        engine.add_request(PROMPTS[0], knowledge, on_output=outputs.put_nowait, streaming=streaming)
        found = [await asyncio.wait_for(outputs.get(), PATIENCE_S)]
        while not found[-1].is_finished():
            found.append(await asyncio.wait_for(outputs.get(), PATIENCE_S))
        return found

    with engine_of(paper) as engine:
        (whole,) = asyncio.run(ask(engine, memory, streaming=False))
        assert whole.generated_tokens == expected
        streamed = asyncio.run(ask(engine, memory, streaming=True))
        assert [output.generated_tokens for output in streamed] == [expected[: end + 1] for end in range(NEW_TOKENS)]
        assert not engine.manager.output_router.result_handlers
        engine.generate([PROMPTS[0]], [None])
        engine.batches.clear()
        del memory
        gc.collect()
        assert gone() is None


def test_a_cancelled_request_lets_its_memory_go_before_the_engine_works_again(paper: Attachment):
    memory = Facts.random(7, seed=1).memory(paper.adapter)
    gone = weakref.ref(memory)

    async def ask(engine: Watched, knowledge: KnowledgeMemory) -> None:
        engine.add_request(PROMPTS[0], knowledge, request_id="a", on_output=lambda output: None)
        engine.cancel("a")

    with engine_of(paper) as engine, engine.manager.pause():
        asyncio.run(ask(engine, memory))
        assert not engine.manager.output_router.result_handlers
        del memory
        gc.collect()
        assert gone() is None
    engine.cancel("a")  # whoever comes too late is not told off


def test_what_a_cancelled_request_says_late_is_not_kept(paper: Attachment):
    async def ask(engine: Watched) -> None:
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        options: dict[str, Any] = {"max_new_tokens": 300, "streaming": True}
        engine.add_request(PROMPTS[0], None, request_id="heard", on_output=outputs.put_nowait, **options)
        engine.add_request(PROMPTS[0], None, request_id="fetched", **options)
        await asyncio.wait_for(outputs.get(), PATIENCE_S)
        for name in ("heard", "fetched"):
            engine.cancel(name)
            # What the step at work still says of it.
            engine.manager.output_router.deliver(GenerationOutput(request_id=name))

    with engine_of(paper) as engine:
        asyncio.run(ask(engine))
        assert engine.generate([PROMPTS[1]], [None]) == [alone(paper, PROMPTS[1], None)]
        late = iter(lambda: engine.get_result(timeout=0.01), None)
        assert {output.request_id for output in late} <= {"fetched"}
        engine.manager.output_router.deliver(GenerationOutput(request_id="heard"))
        assert engine.manager.output_router.output_queue.empty()


def test_tokens_are_chosen_as_the_caller_wants_request_by_request(paper: Attachment):
    seen: list[list[str]] = []

    def choose(logits: torch.Tensor, requests: Sequence[Any]) -> torch.Tensor:
        names = [request.request_id for request in requests]
        seen.append(names)
        assert len(logits) >= len(names)
        for row, request in enumerate(requests):
            if request.request_id == "seven":
                logits[row, 7] = logits[row].max() + 1
        return logits

    with KnowledgeBatching(paper, greedy(), cache(max_batch_tokens=16), choose) as engine:
        with engine.manager.pause():
            engine.add_request(PROMPTS[0] * 4, request_id="long")
            engine.add_request(PROMPTS[1], request_id="seven")
            engine.add_request(PROMPTS[2], request_id="plain")
        answers = collect(engine, ["long", "seven", "plain"])
    assert answers["seven"] == [7] * NEW_TOKENS
    assert answers["plain"] == alone(paper, PROMPTS[2], None)
    assert answers["long"] == alone(paper, PROMPTS[0] * 4, None)
    assert max(map(len, seen)) > 1


def test_an_engine_that_is_aborted_fails_what_it_was_asked(paper: Attachment):
    with engine_of(paper) as engine:
        assert engine.is_running
        assert engine.capacity == 4 * 96
        engine.add_request(PROMPTS[0], request_id="a", max_new_tokens=300, streaming=True)
        assert engine.get_result(timeout=PATIENCE_S) is not None
        engine.abort()
        engine.join()
        assert not engine.is_running
        outputs = engine.manager.output_router.output_queue
        last = [outputs.get_nowait() for _ in range(outputs.qsize())][-1]
        assert (last.request_id, last.error is not None) == ("a", True)
        engine.abort()
    assert not engine.is_running


def collect(engine: KnowledgeBatching, ids: Sequence[str]) -> dict[str, list[int]]:
    """The finished answers of these requests."""
    answers: dict[str, list[int]] = {}
    while set(answers) != set(ids):
        output = engine.get_result(timeout=PATIENCE_S)
        assert output is not None, "no answer came"
        assert output.error is None, output.error
        if output.is_finished() and output.request_id in ids:
            answers[output.request_id] = output.generated_tokens
    return answers
