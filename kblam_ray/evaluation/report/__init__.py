"""What an evaluation found, to look at: tables, charts, and one page of HTML."""

from kblam_ray.evaluation.report.make import Published, Report, Section, make_report
from kblam_ray.evaluation.report.tables import markdown, sweep_markdown
from kblam_ray.evaluation.report.write import write_report

__all__ = ["Published", "Report", "Section", "make_report", "markdown", "sweep_markdown", "write_report"]
