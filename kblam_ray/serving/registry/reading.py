"""What the reports of replicas say of one knowledge base: whether all serve a version, and how it stands over all."""

from __future__ import annotations

from collections.abc import Mapping

from kblam_ray.serving.wanted import KbDescription, KbReport, KbSpec, ProcessReport, Status

_WORST_FIRST: tuple[Status, ...] = ("failed", "unreachable", "loading", "ready", "unloaded")
"""An unloaded knowledge base is loaded when asked: if another replica has it ready, it is ready."""


def serves(report: ProcessReport, name: str, spec: KbSpec, version: int) -> bool:
    """Whether a replica answers from `version` or a newer one, from just that one where it is pinned."""
    found = report.knowledge_bases.get(name)
    if found is None or (found.uri, found.pinned) != (spec.uri, spec.version):
        return False
    if found.status == "unloaded":
        return _would_load(report, name, spec, version)
    if found.status == "failed" or found.version is None:
        return False
    return found.version == version if spec.version is not None else found.version >= version


def _would_load(report: ProcessReport, name: str, spec: KbSpec, version: int) -> bool:
    """Whether what is not in memory will be `version` or newer once somebody asks for it."""
    if spec.version is not None:
        return spec.version == version
    # The table may have been read before `version` was committed by a load that has not been reported yet, unless the
    # replica knew of `version` when it reported.
    told = report.wanted.knowledge_bases.get(name) if report.wanted is not None else None
    return told is not None and told.at_least is not None and told.at_least >= version


def _has_looked(report: ProcessReport, name: str, spec: KbSpec) -> bool:
    """Whether a replica has read the table since it was told of `spec.at_least`.

    Its newest version counts then, a smaller one too: of a table that was made anew, say.
    """
    told = report.wanted.knowledge_bases.get(name) if report.wanted is not None else None
    found = report.knowledge_bases[name]
    return told is not None and told.at_least == spec.at_least and found.status == "ready" and not found.lag_s


def describe(name: str, spec: KbSpec, answerers: Mapping[str, ProcessReport]) -> KbDescription:
    """How a knowledge base stands.

    The status is the worst of any replica that a client must know of, and the error that replica's; the version is the
    oldest that a replica answers from, its number of facts with it; the latest version the newest that any has seen;
    the lag the largest. A replica that has not taken up the URI yet is loading.

    Args:
        answerers: the last report of each that lives, by process id.
    """
    reports: dict[str, KbReport] = {}
    num_behind = 0
    for process_id in sorted(answerers):
        report = answerers[process_id].knowledge_bases.get(name)
        if report is None or report.uri != spec.uri:
            num_behind += 1
        else:
            reports[process_id] = report
    statuses: list[Status] = [report.status for report in reports.values()]
    if num_behind or not reports:
        statuses.append("loading")
    status = min(statuses, key=_WORST_FIRST.index)
    known = [report for report in reports.values() if report.version is not None and report.status != "failed"]
    serving = [report for report in known if report.status != "unloaded"] or known
    oldest = min(serving, key=lambda report: report.version or 0, default=None)
    seen = [number for report in reports.values() for number in (report.latest_version, report.version)]
    if not all(_has_looked(answerers[process_id], name, spec) for process_id in reports) or not reports:
        seen.append(spec.at_least)
    return KbDescription(
        name=name,
        uri=spec.uri,
        version=oldest.version if oldest else None,
        latest_version=max((number for number in seen if number is not None), default=None),
        pinned=spec.version is not None,
        num_facts=oldest.num_facts if oldest else None,
        encoder=next((report.encoder for report in [*serving, *reports.values()] if report.encoder), None),
        status=status,
        lag_s=max((report.lag_s for report in reports.values()), default=0.0),
        error=next((report.error for report in reports.values() if report.status == status and report.error), None),
    )
