"""The demo student, and the untrained one that it began as."""
