"""Demonstration data and questions."""
