"""Attention as stages."""
