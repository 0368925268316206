"""Score head kernels."""
