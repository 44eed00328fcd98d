"""Prompt producers: small trained networks that write a prompt for the frozen LM."""
