"""How the small base model that ships with the package is made: its words, facts, documents, tokenizer and training."""
