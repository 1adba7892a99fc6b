"""With ``lower=True`` a PyTorch function becomes a JAX program, operator by operator."""
