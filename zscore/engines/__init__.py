"""Engines: prompts in, level distributions out."""
