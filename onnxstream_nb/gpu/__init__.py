"""NVIDIA GPUs: memory, copies, launches and graphs, by the driver; nothing is imported without one
being asked for."""
