<<<<<<< HEAD
"""One script a promise; see README.md."""
=======
"""Attacks on what reads foreign files: see README.md in this folder."""
>>>>>>> origin/main
