"""Replicas of modules hold the tensors of one call."""
