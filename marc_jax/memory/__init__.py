"""The visual memory: events, embeddings, retrieval, compression, storage."""
