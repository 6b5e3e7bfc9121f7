"""The operations of `mx`, one class each, grouped in files by kind; every class in here is found by its file."""
