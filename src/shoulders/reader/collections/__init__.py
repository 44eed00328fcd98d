"""Sources of passages: tables (DPR, BEIR, our own JSONL) and folders of documents."""
