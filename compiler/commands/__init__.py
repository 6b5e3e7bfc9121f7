"""One command of the shell per file: `summary`, `arguments(parser)`, `run(args) -> exit status`; found by file name.

The module's docstring is the command's help. A command imports what is heavy inside `run`: `mxloom --help` imports all.
"""
