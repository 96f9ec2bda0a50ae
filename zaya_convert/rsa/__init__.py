"""Markovian Recursive Self-Aggregation: prompts, the sampling loop and the parity test."""
