"""Arrays, tensors, dtypes and gradients are converted here from one side to the other."""
