"""Arrays, tensors and dtypes, from one side to the other."""
