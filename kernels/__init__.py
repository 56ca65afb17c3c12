"""Operators over packed key/value tensors: schemas, a float64 reference that is their spec, and implementations."""
