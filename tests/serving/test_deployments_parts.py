"""What the deployments are made of, without Serve: batches, admission, calls that are repeated, settings that clash."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from ray import cloudpickle
from ray.exceptions import RayActorError
from starlette.responses import PlainTextResponse

from kblam_ray.demo.application import MODEL_NAME, build, with_demo_model
from kblam_ray.errors import (
    ContextLengthError,
    InputError,
    KblamError,
    NotServedError,
    OverloadedError,
    TableNotFoundError,
    UnavailableError,
)
from kblam_ray.serving import job
from kblam_ray.serving.deployments import application
from kblam_ray.serving.deployments.admission import Admission
from kblam_ray.serving.deployments.backend import ServeBackend
from kblam_ray.serving.deployments.batches import MOST_PER_S, SPACING_S, in_batches, spacing_s
from kblam_ray.serving.deployments.calls import Failure, LostError, asked, repeated, streamed
from kblam_ray.serving.deployments.doorway import Doorway
from kblam_ray.serving.deployments.registry import RegistryClient, RegistryDeployment
from kblam_ray.serving.deployments.tables import tables_of
from kblam_ray.serving.deployments.writer import WriterClient
from kblam_ray.serving.messages import Choice, Event, Finished, Piece, Question, Started, Written
from kblam_ray.serving.metrics import Metrics
from kblam_ray.serving.settings import LimitSettings, ReplicaSettings, ServeSettings
from kblam_ray.serving.wanted import KbSpec, Wanted

DIED = RayActorError()
STARTED, FINISHED = Started(3, 10), Finished((Choice("ab", "stop", False, (), 2),), 3, 10)
QUESTION = Question("request", ({"role": "user", "content": "?"},))


class Response:
    """What a Serve handle gives: an answer or an error to await, or items to go through and perhaps an error."""

    def __init__(self, *items: Any) -> None:
        self.items, self.is_cancelled = list(items), False

    def __await__(self):
        return self.__anext__().__await__()

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if item is FOREVER:
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


FOREVER = object()


class Handle:
    """A Serve handle: every call of a method gets the next of the responses given for it, and the last one for ever."""

    def __init__(self, **responses: list[Callable[[], Response]]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.given: list[Response] = []
        self._responses = responses

    def options(self, stream: bool) -> Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Response:
                handle.calls.append((method, *arguments))
                waiting = handle._responses[method]
                handle.given.append((waiting.pop(0) if len(waiting) > 1 else waiting[0])())
                return handle.given[-1]

        return Method()


def answers(*items: Any) -> Callable[[], Response]:
    return lambda: Response(*items)


def test_a_batch_holds_what_is_there_and_the_first_text_does_not_wait():
    async def events() -> AsyncIterator[Event]:
        yield STARTED
        yield Piece(0, "a")
        await asyncio.sleep(0.05)
        for letter in "bcd":
            yield Piece(0, letter)
        yield FINISHED

    async def run() -> None:
        batches = [batch async for batch in in_batches(events(), lambda: 10_000)]
        assert batches[0] == [STARTED, Piece(0, "a")]
        assert [event for batch in batches for event in batch][-1] == FINISHED
        assert [event.text for batch in batches for event in batch if isinstance(event, Piece)] == list("abcd")
        # Neither the first text nor the end waited for the spacing, and the rest came together.
        assert len(batches) == 2

    asyncio.run(run())


def test_an_error_comes_after_what_was_said_before_it():
    async def events() -> AsyncIterator[Event]:
        yield STARTED
        yield Piece(0, "a")
        raise UnavailableError("broken", help="-")

    found: list[Event] = []

    async def run() -> None:
        async for batch in in_batches(events(), lambda: 0):
            found.extend(batch)

    with pytest.raises(UnavailableError):
        asyncio.run(run())
    assert found == [STARTED, Piece(0, "a")]


def test_closing_batches_closes_the_events_at_once():
    closed = []

    async def events() -> AsyncIterator[Event]:
        try:
            yield Piece(0, "a")
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def run() -> None:
        batches = in_batches(events(), lambda: 0.1)
        assert await anext(batches) == [Piece(0, "a")]
        await batches.aclose()
        assert closed

    asyncio.run(run())


def test_the_more_answers_are_written_the_rarer_are_the_messages_of_each():
    assert spacing_s(1) == SPACING_S
    assert [num / spacing_s(num) for num in (32, 500)] == [MOST_PER_S, MOST_PER_S]


def test_as_many_are_admitted_as_work_and_wait():
    metrics = Metrics("gateway-1", "gateway")
    admission = Admission(LimitSettings(max_ongoing_requests=2, max_queued_requests=3), metrics)
    admission.num_answerers = 2
    inside = [admission.admitted() for _ in range(7)]
    for one in inside:
        one.__enter__()
    assert 'kblam_waiting_requests{process="gateway-1"} 3.0' in metrics.text()
    with pytest.raises(OverloadedError), admission.admitted():
        pass
    inside.pop().__exit__(None, None, None)
    with admission.admitted():
        pass
    # A replica has died: those inside stay, nobody comes in until they are fewer.
    admission.num_answerers = 1
    with pytest.raises(OverloadedError), admission.admitted():
        pass


def test_gateways_share_the_places_of_the_replicas():
    limits = LimitSettings(max_ongoing_requests=3, max_queued_requests=1)
    admission = Admission(limits, Metrics("gateway-1", "gateway"), num_gateways=2)
    with ExitStack() as inside:
        for _ in range(3):  # two of the three places, rounded up, and one that waits
            inside.enter_context(admission.admitted())
        with pytest.raises(OverloadedError):
            inside.enter_context(admission.admitted())


def test_a_call_is_repeated_until_somebody_lives():
    handle = Handle(describe=[answers(DIED), answers(asyncio.CancelledError()), answers(DIED), answers("overview")])
    assert asyncio.run(RegistryClient(handle).describe()) == "overview"
    assert len(handle.calls) == 4


def test_errors_of_ours_arrive_as_themselves_and_are_not_repeated():
    handle = Handle(put=[answers(Failure(InputError("no URI", where="uri", help="give one")))])
    with pytest.raises(InputError, match=r"no URI \(uri\)"):
        asyncio.run(RegistryClient(handle).put("kb", "x", None))
    assert len(handle.calls) == 1


def test_nobody_in_time_is_unavailable():
    async def ask(response: Callable[[], Response]) -> None:
        handle = Handle(describe=[response])
        await repeated(
            lambda _: asked(lambda: handle.describe.remote()), deadline=time.monotonic() + 0.1, what="the registry"
        )

    for response in (answers(DIED), answers(FOREVER)):
        with pytest.raises(UnavailableError, match="the registry does not answer"):
            asyncio.run(ask(response))


def test_cancelling_a_call_cancels_it_there():
    async def run(call: Callable[[Handle], Any]) -> Handle:
        handle = Handle(complete=[answers(FOREVER)])
        task = asyncio.create_task(call(handle))
        while not handle.given:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    async def stream(handle: Handle) -> None:
        async for _ in streamed(lambda: handle.complete.remote(), lambda item: False):
            pass

    for call in (lambda handle: asked(lambda: handle.complete.remote()), stream):
        assert asyncio.run(run(call)).given[0].is_cancelled
    kept = asyncio.run(run(lambda handle: asked(lambda: handle.complete.remote(), cancels=False)))
    assert not kept.given[0].is_cancelled


def backend(answerers: Handle, **limits: Any) -> ServeBackend:
    settings = LimitSettings(**limits)
    metrics = Metrics("gateway-1", "gateway")
    registry = RegistryClient(Handle())
    return ServeBackend(
        "base",
        settings,
        answerers,
        WriterClient(Handle()),
        registry,
        metrics,
        "gateway-1",
        Admission(settings, metrics),
    )


async def collected(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def test_a_stream_that_has_said_nothing_begins_anew_elsewhere():
    elsewhere = [[Started(4, 10), Piece(0, "a")], [Piece(0, "b"), FINISHED]]
    handle = Handle(stream=[answers(DIED), answers([STARTED], DIED), answers(*elsewhere)])
    events = asyncio.run(collected(backend(handle).stream(QUESTION)))
    assert events == [Started(4, 10), Piece(0, "a"), Piece(0, "b"), FINISHED]
    # A request that is over is not cancelled.
    assert not handle.given[-1].is_cancelled
    assert len(handle.calls) == 3


def test_a_stream_that_has_said_something_breaks_off():
    handle = Handle(stream=[answers([STARTED, Piece(0, "a")], DIED), answers([STARTED, FINISHED])])

    found: list[Event] = []

    async def run() -> None:
        async for event in backend(handle).stream(QUESTION):
            found.append(event)

    with pytest.raises(UnavailableError):
        asyncio.run(run())
    assert found == [STARTED, Piece(0, "a")]
    assert len(handle.calls) == 1


def test_a_broken_replica_is_left_for_another_and_a_wrong_question_is_not():
    broken = Failure(UnavailableError("the engine is dead", help="-"), is_broken=True)
    handle = Handle(complete=[answers(broken), answers(FINISHED)])
    assert asyncio.run(backend(handle).complete(QUESTION)) == FINISHED
    too_long = Failure(ContextLengthError("too long", help="ask for less"))
    handle = Handle(complete=[answers(too_long)], stream=[answers(too_long)])
    with pytest.raises(ContextLengthError):
        asyncio.run(backend(handle).complete(QUESTION))
    with pytest.raises(ContextLengthError):
        asyncio.run(collected(backend(handle).stream(QUESTION)))


def test_replicas_that_stay_away_are_given_up_at_the_requests_timeout():
    handle = Handle(stream=[answers(DIED)], complete=[answers(DIED)])
    impatient = backend(handle, request_timeout_s=0.1)
    with pytest.raises(UnavailableError):
        asyncio.run(collected(impatient.stream(QUESTION)))
    with pytest.raises(UnavailableError):
        asyncio.run(impatient.complete(QUESTION))


def test_closing_a_stream_cancels_it_and_frees_its_place():
    handle = Handle(stream=[answers([STARTED, Piece(0, "a")], FOREVER)])
    one_place = backend(handle, max_ongoing_requests=1, max_queued_requests=1)

    async def run() -> None:
        for _ in range(5):
            events = one_place.stream(QUESTION)
            assert await anext(events) == STARTED
            await events.aclose()

    asyncio.run(run())
    assert all(response.is_cancelled for response in handle.given)


def test_a_write_is_repeated_and_a_deletion_that_was_done_is_done():
    gone = Failure(NotServedError("there is no such fact", help="-"))
    handle = Handle(write=[answers(DIED), answers(Written(4, unchanged=1))])
    assert asyncio.run(WriterClient(handle).write("kb", "uri", [])).kb_version == 4
    handle = Handle(delete=[answers(DIED), answers(gone)], newest_version=[answers(7)])
    assert asyncio.run(WriterClient(handle).delete("kb", "uri", [], [1])) == Written(7, deleted=1)
    handle = Handle(delete=[answers(gone)])
    with pytest.raises(NotServedError):
        asyncio.run(WriterClient(handle).delete("kb", "uri", [], [1]))


def test_a_registry_that_is_replaced_is_told_of_the_version_and_asked_for_the_rest_of_the_time():
    handle = Handle(wait_served=[answers(DIED), answers(True)], committed=[answers(None)])
    assert asyncio.run(RegistryClient(handle).wait_served("kb", 5, 20)) is True
    assert [call[0] for call in handle.calls] == ["wait_served", "committed", "wait_served"]
    assert 0 < handle.calls[-1][3] < 20
    never = Handle(wait_served=[answers(FOREVER)])
    assert asyncio.run(RegistryClient(never).wait_served("kb", 5, -0.9)) is False


def test_a_successor_that_knows_less_is_not_believed():
    early = Failure(UnavailableError("the registry was restarted", help="-"))
    known, newer = Wanted(8, {"kb": KbSpec("/kb")}), Wanted(9, {"kb": KbSpec("/kb", 1)})
    handle = Handle(wanted=[answers(known), answers(early), answers(newer)])
    client = RegistryClient(handle)

    async def run() -> None:
        assert await client.wanted() == known
        assert await client.wanted() == newer
        assert [call[1] for call in handle.calls] == [None, 8, 8]
        assert client.last_wanted == newer

    asyncio.run(run())


def test_user_config_changes_what_is_wanted(tmp_path):
    registry = RegistryDeployment(
        ServeSettings(state_uri=str(tmp_path / "state.json")), {"given": KbSpec(str(tmp_path / "given"))}
    )
    a, b = {"uri": str(tmp_path / "a"), "version": 2}, {"uri": str(tmp_path / "b")}

    async def run() -> None:
        await registry.reconfigure({"knowledge_bases": {"a": a, "b": b}})
        wanted = await registry.wanted(None, 0)
        assert {name: spec.version for name, spec in wanted.knowledge_bases.items()} == {
            "a": 2,
            "b": None,
            "given": None,
        }
        # Somebody pins by a request; the configuration goes on about something else.
        await registry.put("b", b["uri"], 7)
        await registry.reconfigure({"knowledge_bases": {"a": {**a, "version": 3}, "b": b}})
        wanted = await registry.wanted(None, 0)
        assert {name: spec.version for name, spec in wanted.knowledge_bases.items()} == {"a": 3, "b": 7, "given": None}
        await registry.reconfigure({"knowledge_bases": {"b": b}})
        assert set((await registry.wanted(None, 0)).knowledge_bases) == {"b", "given"}
        for wrong in (
            {"knowledge_base": {}},
            {"knowledge_bases": {"a": {"url": "x"}}},
            {"knowledge_bases": {"a/b": b}},
        ):
            with pytest.raises(InputError, match="user_config"):
                await registry.reconfigure(wrong)

    asyncio.run(run())


def test_a_closed_door_turns_away_and_waits_for_those_inside():
    may_end = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await may_end.wait()
        await PlainTextResponse("done", headers={"x-request-id": "one"})(scope, receive, send)

    async def run() -> None:
        doorway = Doorway(app, retry_after_s=7)
        transport = httpx.ASGITransport(doorway)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            inside = asyncio.create_task(client.get("/", headers={"x-request-id": "one"}))
            while not doorway.num_open:
                await asyncio.sleep(0)
            assert await doorway.drain(0.01) == 1
            refused = await client.get("/")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
            assert refused.json()["error"]["code"] == "unavailable"
            draining = asyncio.create_task(doorway.drain(30))
            may_end.set()
            assert await draining == 0
            answer = await inside
            assert answer.text == "done"
            # Serve's proxy adds the id that it passed on.
            assert "x-request-id" not in answer.headers
            assert doorway.num_served == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "name", "uri"),
    [
        ("world=s3://bucket/kb", "world", "s3://bucket/kb"),
        ("s3://bucket/a=b/my kb!", "my-kb", "s3://bucket/a=b/my kb!"),
        ("/kb/_världen", "v-rlden", "/kb/_världen"),
        ("/kb/world/", "world", "/kb/world"),
    ],
)
def test_tables_are_named(given, name, uri):
    assert tables_of([given]) == {name: KbSpec(uri)}


def test_names_that_cannot_be_are_refused():
    for given in (["/a/kb", "/b/kb"], ["/kb/***"], ["gs://bucket/kb"], [""]):
        with pytest.raises(InputError):
            tables_of(given)


MODEL = {"base_model": "models/llama", "adapter": "adapters/world"}


def deployments_of(app: Any) -> dict[str, Any]:
    """The deployments of an application by name, those bound to others included."""
    found: dict[str, Any] = {}
    waiting = [app]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        arguments = [*deployment.init_args, *deployment.init_kwargs.values()]
        waiting += [argument for argument in arguments if hasattr(argument, "_bound_deployment")]
    return found


def test_an_application_is_what_its_settings_say(monkeypatch):
    monkeypatch.setenv("KBLAM_API_KEYS", "sk-secret-of-a-client")
    settings = ServeSettings(
        **MODEL,
        replicas=ReplicaSettings(min_replicas=2, max_replicas=5, num_gpus=1, num_cpus=3, gateways=2),
        limits=LimitSettings(max_ongoing_requests=7, drain_timeout_s=11),
    )
    app = application.build(settings)
    found = deployments_of(app)
    assert set(found) == {"Gateway", "Answerer", "Writer", "Registry"}
    answerer = found["Answerer"]
    assert answerer.ray_actor_options == {"num_cpus": 3.0, "num_gpus": 1.0}
    assert answerer.max_ongoing_requests == 7
    scaling = answerer._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert answerer._deployment_config.graceful_shutdown_timeout_s > 11
    assert found["Gateway"].num_replicas == 2
    for light in ("Gateway", "Writer", "Registry"):
        assert found[light].ray_actor_options["num_cpus"] == 0
    assert b"sk-secret" not in cloudpickle.dumps([each.init_args for each in found.values() if each.name == "Gateway"])


def test_the_demos_model_answers_where_none_is_named():
    settings = with_demo_model(ServeSettings())
    assert settings.model_name == MODEL_NAME
    assert with_demo_model(ServeSettings(**MODEL)) == ServeSettings(**MODEL)
    assert deployments_of(build({"replicas": {"min_replicas": 3}}))["Answerer"].num_replicas == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_model": "models/llama"},
        {"bundle": "bundles/world", "adapter": "adapters/world"},
        {**MODEL, "model_name": "llama:8b"},
        {**MODEL, "replicas": ReplicaSettings(min_replicas=4, max_replicas=2)},
        {**MODEL, "kb": ["/a/kb", "/b/kb"]},
    ],
)
def test_settings_that_clash_are_refused(wrong):
    with pytest.raises(InputError):
        application.build(ServeSettings(**wrong))


def test_the_job_refuses_what_cannot_be_served_before_it_starts_anything(tmp_path, monkeypatch):
    def start_ray() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(job, "start_ray", start_ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("KBLAM_API_KEYS", "KBLAM_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match="nothing can listen"):
            job.serve(ServeSettings(**MODEL, port=port))
    free = {**MODEL, "port": port}
    with pytest.raises(TableNotFoundError):
        job.serve(ServeSettings(**free, kb=[str(tmp_path / "kb")]))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InputError, match="without keys"):
            job.serve(ServeSettings(**free, host=host))
    with pytest.raises(InputError, match="no model is named"):
        job.serve(ServeSettings(port=port))
    with pytest.raises(AssertionError, match="Ray was started"):
        job.serve(ServeSettings(**free))


def test_a_failure_crosses_processes_as_it_is():
    sent = cloudpickle.loads(cloudpickle.dumps(Failure(OverloadedError("full", where="here", help="wait"))))
    with pytest.raises(OverloadedError, match=r"full \(here\). Help: wait"):
        raise sent.error
    assert isinstance(sent.error, KblamError)
    assert not issubclass(LostError, KblamError)  # it never leaves the gateway
