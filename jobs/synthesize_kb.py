"""Make synthetic facts, and questions about them: from templates with no account, or by asking a chat model.

python jobs/synthesize_kb.py --num-facts 100000 --output facts.jsonl --questions questions.jsonl
python jobs/synthesize_kb.py --generator openai --chat-model gpt-4o-mini --num-facts 9000 --output facts.parquet
"""

from kblam_ray.facts.synthetic.run import SynthesizeSettings, synthesize
from kblam_ray.job import main

if __name__ == "__main__":
    main("synthesize_kb", SynthesizeSettings, synthesize)
