"""Hugging Face directories in and out: one table a family drives both directions."""
