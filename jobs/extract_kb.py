"""Extract facts from documents (text, Markdown, HTML, PDF): offline by rule, or with a chat model.

python jobs/extract_kb.py --input docs/ --output facts.jsonl
python jobs/extract_kb.py --input 's3://bucket/docs/*.pdf' --chat-model gpt-4o-mini --output facts.parquet
"""

from kblam_ray.facts.extract.run import ExtractSettings, extract
from kblam_ray.job import main

if __name__ == "__main__":
    main("extract_kb", ExtractSettings, extract)
