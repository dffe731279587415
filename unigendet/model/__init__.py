"""The model: decoder, ViT, embeddings, heads, cache, losses, checkpoints."""
