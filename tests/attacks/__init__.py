"""Attacks on what reads foreign files: see README.md in this folder."""
