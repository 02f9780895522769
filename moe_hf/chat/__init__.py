"""Chat templates: which tokens of a chat are the assistant's answers, and what a model answers."""
