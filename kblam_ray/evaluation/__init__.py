"""How well a knowledge model retrieves, answers and refuses, beside baselines; begin at `kblam_ray.evaluation.run`."""
