"""Models in: exported from PyTorch, converted between formats, quantised, verified.

Every step takes a `Draft` and gives another; a writer turns the last one into files.
"""
