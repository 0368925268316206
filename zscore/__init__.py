"""zscore: text-to-image pictures as distributions over rubric levels."""
