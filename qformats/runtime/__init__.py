"""Running models: the only room that imports transformers."""
