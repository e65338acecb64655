"""Data sets: where images come from, and which of them make up a batch."""
