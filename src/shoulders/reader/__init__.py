"""Frozen readers: collections, retrievers, re-rankers, the packer and what the LM reads."""
