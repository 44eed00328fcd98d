"""An index: a folder of passages, sparse and dense, that is built, grown, verified and opened."""
