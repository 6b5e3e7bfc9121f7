"""Contractions of packed codes: exact inside a block, accumulated as the operation says."""
