"""lm-evaluation-harness with a frozen LM and its skills as one of its models."""
