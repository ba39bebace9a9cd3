"""Shared ground of the scripts: processes, flags, reports, text, real weights, kernels. Imports no script."""
