"""All that depends on a version of JAX or PyTorch, or on their private names, stands here."""
