"""PyTorch models in: exported by either exporter, and compared."""
