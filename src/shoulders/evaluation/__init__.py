"""Metrics, comparison of skills, and reports."""
