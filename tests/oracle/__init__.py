"""NumPy float64 oracle, written from the formulas; imports nothing of flashmoe."""
