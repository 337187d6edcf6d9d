"""Embed facts into a knowledge base: shard over workers, embed what is new or changed, commit one version.

python jobs/embed_kb.py --kb kb/world --input facts.jsonl
ray job submit --working-dir . -- python jobs/embed_kb.py --kb s3://bucket/world --input s3://bucket/facts/
"""

from kblam_ray.job import main
from kblam_ray.table.pipeline.run import EmbedSettings, embed

if __name__ == "__main__":
    main("embed_kb", EmbedSettings, embed)
