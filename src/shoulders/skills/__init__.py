"""Skills: passes through one frozen LM, and the folders they are saved to."""
