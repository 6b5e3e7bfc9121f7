"""One command of the shell per file; a command is discovered by its file name."""
