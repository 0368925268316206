"""Rubrics are data: one TOML file each, read by `zscore.rubrics.rubric`."""
