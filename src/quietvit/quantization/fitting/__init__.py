"""Shared code to fit steps, roundings and weights: searches, least squares, reconstruction.

``methods`` use it; code that needs no fitting is in the package above.
"""
