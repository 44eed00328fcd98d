"""`shoulders compare`: frozen methods against fine-tuning, on one's own rows and LM."""
