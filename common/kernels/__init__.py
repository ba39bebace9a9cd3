"""Triton kernels, one file per topic. Each has its plain torch twin in a script."""
