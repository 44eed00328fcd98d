"""The frozen language model: load, freeze, fingerprint, combine, decode, score."""
