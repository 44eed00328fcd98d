"""Data without torch: rows, templates, mixtures and batches."""
