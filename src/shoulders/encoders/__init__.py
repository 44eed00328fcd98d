"""Frozen text encoders that tell a producer what an input says, and a cache of their outputs."""
