"""One pass per file; a pass is discovered by its file name."""
