"""One script a promise; see README.md."""
