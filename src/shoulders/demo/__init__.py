"""The demo: one linear file (`run.py`) and the mixture of tasks that it trains on."""
