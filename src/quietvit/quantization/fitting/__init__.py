"""What several methods share to fit steps, roundings and weights: searches, sums, reconstruction.

Which method uses what is told in ``methods``; what works without any method lives one floor below.
"""
