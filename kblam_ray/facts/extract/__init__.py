"""Facts from documents: by the rules of their form, or read by a chat model."""
