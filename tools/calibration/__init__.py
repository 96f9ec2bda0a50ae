"""Builds the text that quantization is calibrated on when a person gives none."""
