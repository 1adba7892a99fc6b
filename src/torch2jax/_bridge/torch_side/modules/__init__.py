"""Replicas of modules, which hold the tensors of one call."""
