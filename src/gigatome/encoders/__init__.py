"""Networks that turn pixels or embeddings into vectors."""
