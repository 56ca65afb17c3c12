"""Choosing how much of a cache to keep: ranks and bits for a number of bytes."""
