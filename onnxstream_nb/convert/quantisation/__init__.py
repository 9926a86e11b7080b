"""Weights, and activations, in fewer bits: methods, calibration, and the forms that are written."""
