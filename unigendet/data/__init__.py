"""Images and texts on disk become samples and packs."""
