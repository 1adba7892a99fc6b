"""Autograd graphs are kept from a forward call for its backward call."""
