"""Retrievers: sparse, dense (exact or approximate) and their fusion, all with one `search`."""
