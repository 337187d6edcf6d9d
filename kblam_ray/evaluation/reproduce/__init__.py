"""The published experiments by name, with their settings as YAML; begin at `kblam_ray.evaluation.reproduce.run`."""
