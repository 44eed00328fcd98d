"""Engines of others behind our interfaces, for what is larger than our own index is made for."""
