"""The OpenAPI document is true: requests made from it, and made to break it, get what it says."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import schemathesis
from http_samples import ADMIN_KEY, KB, KEYS, MODEL, OTHER_URI, URI, make_app, memory_backend
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

ACCEPTED = ["2xx", "404", "409"]
"""Of well-formed requests; some cannot be answered all the same: from a version not reached yet, of no such fact."""

REJECTED = ["400", "404", "405", "413", "422"]
"""Of ill-formed ones."""

CONFIG = {
    "headers": {"Authorization": f"Bearer {ADMIN_KEY}"},
    "generation": {"deterministic": True},
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ACCEPTED},
        "negative_data_rejection": {"expected-statuses": REJECTED},
    },
}

backend = memory_backend()
app = make_app(backend, keys=KEYS, max_body_bytes=100_000, max_facts=20)
schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(CONFIG))

calm = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def check(case: schemathesis.Case) -> None:
    """One request, to a server that is as it was before the last one."""
    fresh = memory_backend()
    backend.tables, backend.served = fresh.tables, fresh.served
    if case.meta.generation.mode.is_positive:
        name_what_there_is(case)
    case.call_and_validate()


def name_what_there_is(case: schemathesis.Case) -> None:
    """Names made up at random are not found, and nothing behind them would be tried."""
    if "name" in case.path_parameters:
        case.path_parameters["name"] = KB
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = (MODEL, f"{MODEL}:{KB}", f"{MODEL}:{KB}@0")[len(case.body["model"]) % 3]
    if isinstance(case.body, dict) and "uri" in case.body:
        case.body["uri"] = (URI, OTHER_URI)[len(case.body["uri"]) % 2]


def test_the_document_has_the_limits_of_this_server():
    schemas = make_app(max_choices=3, max_facts=7).openapi()["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 3
    assert schemas["NewFacts"]["properties"]["facts"]["maxItems"] == 7
    assert schemas["FactNames"]["properties"]["facts"]["maxItems"] == 7


def test_the_document_refers_to_nothing_that_is_not_in_it():
    document = json.dumps(app.openapi())
    named = set(re.findall(r"#/components/schemas/(\w+)", document))
    assert named
    assert named <= app.openapi()["components"]["schemas"].keys()


def test_the_document_asks_for_keys_where_there_are_keys():
    paths = app.openapi()["paths"]
    secured = {path for path, methods in paths.items() if all(each.get("security") for each in methods.values())}
    assert secured == set(paths) - {"/health", "/metrics"}
    assert "securitySchemes" not in make_app().openapi()["components"]


def test_nothing_is_called_in_a_thread():
    """A plain function among endpoints and dependencies costs a hop to a thread and back, most of a request's time."""
    for route in app.routes:
        for part in [route.dependant, *route.dependant.dependencies] if hasattr(route, "dependant") else []:
            assert inspect.iscoroutinefunction(part.call), part.call


@schema.parametrize()
@settings(calm, max_examples=4)
def test_the_server_does_what_its_document_says(case):
    check(case)


@pytest.mark.slow
@schema.parametrize()
@settings(calm, max_examples=200)
def test_the_server_does_what_its_document_says_at_length(case):
    check(case)
