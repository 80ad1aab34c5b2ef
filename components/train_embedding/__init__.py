"""Contrastive fine-tuning of a language model as an encoder for retrieval."""
