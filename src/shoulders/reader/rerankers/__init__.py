"""Re-rankers: a trained cross-encoder, the frozen LM's likelihood, and fusions of several."""
