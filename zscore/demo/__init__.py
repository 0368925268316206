"""The demo student and the demo shards."""
