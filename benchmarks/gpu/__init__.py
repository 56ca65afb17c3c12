"""What the packed cache is worth on a GPU, against everything that attends to a dense one; see docs/gpu.md."""
