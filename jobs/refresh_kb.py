"""Keep a knowledge base in step with its sources: watch files or an S3 prefix, take up what changed, commit.

    python jobs/refresh_kb.py --kb kb/world --input exports/
    python jobs/refresh_kb.py --kb s3://bucket/world --input s3://bucket/exports/ --sqs-queue-url https://sqs...
    ray job submit -- python jobs/refresh_kb.py --kb s3://bucket/world --input s3://bucket/exports/ --once

It may run twice at once, beside other writers, and be killed at any moment. SIGTERM ends it after the refresh that is
under way. What it does is said on stderr, and stands in KB.refresh/status.json.
"""

from kblam_ray.job import main
from kblam_ray.table.refresh.run import refresh
from kblam_ray.table.refresh.settings import RefreshSettings

if __name__ == "__main__":
    main("refresh_kb", RefreshSettings, refresh)
