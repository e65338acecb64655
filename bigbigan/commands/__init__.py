"""The verbs of the command line, a module a group; torch is imported when one runs, not for its help."""
