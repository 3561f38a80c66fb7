"""What each command on runs does: its options, whose docstrings are the help, and one function.

Nothing heavy is imported before it is needed, so that `--help` and mistakes answer at once.
"""
