"""What `shoulders bench` measures: this machine's limit, our speed, and the peers' beside it."""
