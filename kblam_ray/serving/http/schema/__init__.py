"""Bodies of requests and answers: the OpenAI schema as far as it is supported, and what this server adds to it."""
