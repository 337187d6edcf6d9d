"""The registry as a deployment of one replica, which Serve replaces when it dies, and the client that outlives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationError

from kblam_ray.errors import InputError, NotServedError, UnavailableError
from kblam_ray.job import JobConfig
from kblam_ray.serving.deployments.calls import Failure, asked, outcome, repeated
from kblam_ray.serving.logs import configure_logging
from kblam_ray.serving.registry import Registry, StateStore
from kblam_ray.serving.settings import KbName, ServeSettings
from kblam_ray.serving.wanted import KbSpec, Overview, ProcessReport, RegistryLike, Wanted

PATIENCE_S = 30.0
"""How long a call waits for a registry that is being replaced: a new process takes about five seconds."""

REPORT_PATIENCE_S = 5.0
"""A report is out of date after that; the next one says more."""

LEARNING_S = 0.1
"""Pause before a registry that is being told what was wanted is asked again."""

WHAT = "the registry"


class UserKnowledgeBase(JobConfig):
    """A knowledge base in the `user_config` of a Serve YAML."""

    uri: str = Field(min_length=1, description="the table: a local path or s3://bucket/prefix")
    version: NonNegativeInt | None = Field(None, description="the version to stay at; none follows the newest")


class UserConfig(JobConfig):
    """The `user_config` of the registry: changing it and deploying again changes what is served, without a restart."""

    knowledge_bases: dict[KbName, UserKnowledgeBase] = Field(default_factory=dict, description="what to serve, by name")


@dataclass(frozen=True)
class Renewed:
    """What a process is told that reports: what is wanted, where that is known, and how many answerers live."""

    wanted: Wanted | None
    num_answerers: int


class RegistryDeployment:
    """One replica: it knows what is wanted and who serves what. Answers with `calls.Failure` instead of raising.

    Args:
        initial: knowledge bases of the command line, added to what the state object remembers.
    """

    def __init__(self, settings: ServeSettings, initial: Mapping[str, KbSpec]) -> None:
        configure_logging("registry")
        self._settings, self._initial = settings, dict(initial)
        self._registry_or_none: Registry | None = None
        self._configured: Mapping[str, UserKnowledgeBase] = {}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this right after the start and at every change of `user_config`.

        At the start a knowledge base that was wanted before keeps its pin: a rollback outlives a restart. Later, what
        changed in the configuration wins over what was asked for meanwhile, and what it names no more is removed.

        Raises:
            InputError: the configuration has another form.
            StorageError: the state cannot be read or written.
        """
        configured = _configured(user_config)
        if self._registry_or_none is None:
            specs = {name: KbSpec(kb.uri, kb.version) for name, kb in configured.items()}
            store = StateStore(self._settings.state_uri)
            registry = Registry(store, {**self._initial, **specs}, self._settings.replicas.lease_s)
            await registry.start()
            self._registry_or_none, self._configured = registry, configured
            return
        for name, kb in configured.items():
            if self._configured.get(name) != kb:
                await self._registry.put(name, kb.uri, kb.version)
        wanted = (await self._registry.wanted()).knowledge_bases
        for name in (self._configured.keys() - configured.keys()) & wanted.keys():
            await self._registry.remove(name)
        self._configured = configured

    @property
    def _registry(self) -> Registry:
        assert self._registry_or_none is not None, "the deployment is given a user_config"
        return self._registry_or_none

    async def report(self, report: ProcessReport) -> Failure | None:
        """See `RegistryLike`, as with the methods below."""
        return await outcome(self._registry.report(report))

    async def leave(self, process_id: str) -> Failure | None:
        return await outcome(self._registry.leave(process_id))

    async def wanted(self, known: int | None, timeout_s: float) -> Wanted | Failure:
        return await outcome(self._registry.wanted(known, timeout_s))

    async def put(self, name: str, uri: str, version: int | None) -> Wanted | Failure:
        return await outcome(self._registry.put(name, uri, version))

    async def remove(self, name: str) -> Wanted | Failure:
        return await outcome(self._registry.remove(name))

    async def committed(self, name: str, version: int) -> Failure | None:
        return await outcome(self._registry.committed(name, version))

    async def wait_served(self, name: str, version: int, timeout_s: float) -> bool | Failure:
        return await outcome(self._registry.wait_served(name, version, timeout_s))

    async def describe(self) -> Overview | Failure:
        return await outcome(self._registry.describe())

    async def renew(self, report: ProcessReport) -> Renewed | Failure:
        """Take a report and tell what a process wants to know as often: one call instead of three."""
        return await outcome(self._renew(report))

    async def _renew(self, report: ProcessReport) -> Renewed:
        await self._registry.report(report)
        wanted: Wanted | None = None
        # A registry that has only just begun does not know, and says so.
        with suppress(UnavailableError):
            wanted = await self._registry.wanted(None if report.wanted is None else report.wanted.revision)
        overview = await self._registry.describe()
        return Renewed(wanted, sum(role == "answerer" for role in overview.processes.values()))


def _configured(user_config: dict[str, Any]) -> dict[str, UserKnowledgeBase]:
    try:
        return dict(UserConfig.model_validate(user_config).knowledge_bases)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["user_config", *map(str, first["loc"])])
        help = "write knowledge_bases: {name: {uri: ..., version: ...}}"
        raise InputError(first["msg"], where=where, help=help) from None


class RegistryClient(RegistryLike):
    """The registry as other processes see it: a call whose registry died waits for its successor.

    Args:
        handle: of the deployment.

    Attributes:
        last_wanted: what was wanted when it was last said; None before. A report of it helps a successor.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.last_wanted: Wanted | None = None

    async def report(self, report: ProcessReport) -> None:
        """See `RegistryLike`; every method raises UnavailableError where no registry answers in time."""
        await self._call("report", report, patience_s=REPORT_PATIENCE_S)

    async def leave(self, process_id: str) -> None:
        """See `RegistryLike`."""
        await self._call("leave", process_id, patience_s=REPORT_PATIENCE_S)

    async def wanted(self, known: int | None = None, timeout_s: float = 0.0) -> Wanted:
        """See `RegistryLike`. A registry that is still being told what was wanted is asked again."""
        deadline = time.monotonic() + PATIENCE_S + timeout_s
        last = self.last_wanted
        # Who names no revision would be told too little by a registry that has only just begun.
        revision = last.revision if known is None and last is not None else known
        while True:
            try:
                return self._heard(await self._call("wanted", revision, timeout_s, patience_s=PATIENCE_S + timeout_s))
            except UnavailableError:
                if known is not None or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LEARNING_S)

    async def put(self, name: str, uri: str, version: int | None) -> Wanted:
        """See `RegistryLike`."""
        return self._heard(await self._call("put", name, uri, version))

    async def remove(self, name: str) -> Wanted:
        """See `RegistryLike`."""

        async def remove(is_repeated: bool) -> Wanted:
            try:
                return await self._once("remove", name)
            except NotServedError:
                if not is_repeated:
                    raise
                # The registry that was lost had removed it.
                return await self._once("wanted", None, 0.0)

        return self._heard(await repeated(remove, deadline=time.monotonic() + PATIENCE_S, what=WHAT))

    async def committed(self, name: str, version: int) -> None:
        """See `RegistryLike`."""
        await self._call("committed", name, version)

    async def wait_served(self, name: str, version: int, timeout_s: float) -> bool:
        """See `RegistryLike`. A registry that is replaced meanwhile is asked for the time that is left."""
        deadline = time.monotonic() + timeout_s

        async def wait(is_repeated: bool) -> bool:
            if is_repeated:  # the successor has not heard that there is a newer version
                await self._once("committed", name, version)
            return await self._once("wait_served", name, version, max(0.0, deadline - time.monotonic()))

        try:
            # The time over is the registry's to say; a moment more lets its answer come.
            return await repeated(wait, deadline=deadline + 1, what=WHAT)
        except UnavailableError:
            return False

    async def describe(self) -> Overview:
        """See `RegistryLike`."""
        return await self._call("describe")

    async def renew(self, report: ProcessReport) -> int:
        """Report, hear what is wanted, and how many answerers live as far as is known."""
        renewed: Renewed = await self._call("renew", report, patience_s=REPORT_PATIENCE_S)
        if renewed.wanted is not None:
            self._heard(renewed.wanted)
        return renewed.num_answerers

    async def _call(self, method: str, *arguments: Any, patience_s: float = PATIENCE_S) -> Any:
        return await repeated(
            lambda _: self._once(method, *arguments), deadline=time.monotonic() + patience_s, what=WHAT
        )

    async def _once(self, method: str, *arguments: Any) -> Any:
        return await asked(lambda: getattr(self._handle, method).remote(*arguments))

    def _heard(self, wanted: Wanted) -> Wanted:
        if self.last_wanted is None or wanted.revision >= self.last_wanted.revision:
            self.last_wanted = wanted
        return wanted
