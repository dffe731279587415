"""Generating images and detecting generated ones with a trained model."""
