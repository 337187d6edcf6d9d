"""The web page at `/`: ask, see which facts the answer rests on, change one, ask again."""

from kblam_ray.serving.http.page.mount import mount_page

__all__ = ["mount_page"]
