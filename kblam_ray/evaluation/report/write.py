"""Writing a report beside the figures that it is of."""

from __future__ import annotations

from kblam_ray.evaluation.report.make import PLOTS, Report
from kblam_ray.storage import join, normalize, replace_file


def write_report(output: str, report: Report) -> list[str]:
    """Write `report.html`, `report.md` and `plots/*.png`: each whole or not at all, the page last.

    Args:
        output: a folder: a local path or `s3://bucket/prefix`; made where it is not there.

    Returns:
        The names written, below `output`; the page first.

    Raises:
        StorageError: the folder cannot be written.
    """
    files = {"report.html": report.html.encode("utf-8"), "report.md": report.markdown.encode("utf-8")}
    files |= {f"{PLOTS}/{name}": content for name, content in report.plots.items()}
    place = normalize(output)
    for name in reversed(files):
        replace_file(join(place, name), files[name])
    return list(files)
