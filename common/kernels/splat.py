"""Triton: splats."""


def available(device=None):
    return False
