"""What an evaluation found, to look at: tables, charts, and one page of HTML."""

from kblam_ray.evaluation.report.tables import markdown, sweep_markdown

__all__ = ["markdown", "sweep_markdown"]
