"""One backend per file or folder; a backend is discovered by its name."""
