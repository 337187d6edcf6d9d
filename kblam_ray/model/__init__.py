"""A base model, an adapter and knowledge as one: asking, chat templates, the question prior, planning, bundles."""
