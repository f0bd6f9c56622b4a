"""Literal references: slow, obvious, and independent of the code under test."""
