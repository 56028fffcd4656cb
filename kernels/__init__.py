"""The Triton kernels, one module per operator, installed as `sda_fast.kernels`.

Importing one of them imports Triton; importing this package does not.
"""
