"""Flax modules: mixers, feed-forward, norms, embeddings and their stack."""
