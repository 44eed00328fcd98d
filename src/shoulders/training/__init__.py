"""Training the small networks around a frozen LM."""
