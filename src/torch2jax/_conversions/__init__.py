"""Arrays, tensors, dtypes and gradients are converted from one side to the other here."""
