"""Recursion: the frozen LM reads what it has written, as text or as states."""
