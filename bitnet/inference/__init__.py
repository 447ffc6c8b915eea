"""Serve what was trained: packed weights, the files they travel in, and the fused blocks that multiply them."""
