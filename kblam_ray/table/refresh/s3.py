"""Amazon's own client: for what pyarrow's filesystem does not tell (ETags), and for queues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kblam_ray import storage
from kblam_ray.errors import StorageError

_CLIENTS: dict[str, tuple[Any, Any]] = {}
"""Service and region -> what the last client was made with, and it: making one takes a tenth of a second."""


def client(service: str, region: str | None = None, read_timeout_s: float = storage.REQUEST_TIMEOUT_S) -> Any:
    """A client of an Amazon service, with the settings and credentials that `storage` finds.

    Raises:
        StorageError: no such profile, a sign-in that has run out, an endpoint that is no URL.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = storage.resolve_s3()
    region = region or settings.region
    made_with, made = _CLIENTS.get(f"{service} {region}", (None, None))
    if made_with != settings:
        config = Config(
            connect_timeout=storage.CONNECT_TIMEOUT_S,
            read_timeout=read_timeout_s,
            retries={"total_max_attempts": storage.MAX_ATTEMPTS, "mode": "standard"},
            **({} if settings.access_key else {"signature_version": UNSIGNED}),
        )
        with client_errors(service):
            made = boto3.Session().client(service, region_name=region, config=config)
        _CLIENTS[f"{service} {region}"] = (settings, made)
    return made


def list_objects(base: str) -> Iterator[tuple[str, str, int, float]]:
    """URI, ETag, size in bytes and time of modification (seconds since 1970) of all objects that begin with `base`.

    Raises:
        StorageError: the store does not answer or refuses.
    """
    bucket, _, key = base.removeprefix("s3://").partition("/")
    with client_errors(base):
        for page in client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for item in page.get("Contents", []):
                uri = f"s3://{bucket}/{item['Key']}"
                yield uri, item["ETag"].strip('"'), item["Size"], item["LastModified"].timestamp()


def look_at(uri: str) -> tuple[str, int, float] | None:
    """ETag, size in bytes and time of modification of one object; None if it is not there.

    Raises:
        StorageError: the store does not answer or refuses.
    """
    from botocore.exceptions import ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with client_errors(uri):
        try:
            head = client("s3").head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return None
            raise
    return head["ETag"].strip('"'), head["ContentLength"], head["LastModified"].timestamp()


@contextmanager
def client_errors(where: str) -> Iterator[None]:
    """Turn the failures of Amazon's client at `where` into a StorageError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, ValueError) as error:
        raise StorageError(
            f"the service does not answer or refuses: {error}",
            where=where,
            help="check the endpoint (AWS_ENDPOINT_URL), region, credentials and rights",
        ) from error
