"""Writing a report beside the figures that it is of."""

from __future__ import annotations

from kblam_ray.evaluation.report.make import PLOTS, Report
from kblam_ray.storage import filesystem, join, normalize, storage_errors


def write_report(output: str, report: Report) -> list[str]:
    """Write `report.html`, `report.md` and `plots/*.png`.

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
    with storage_errors(place):
        store, path = filesystem(place, is_small=True)
        store.create_dir(join(path, PLOTS) if report.plots else path, recursive=True)
        for name, content in files.items():
            with store.open_output_stream(join(path, name)) as stream:
                stream.write(content)
    return list(files)
