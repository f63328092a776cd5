"""What bytes mean: pure functions and plain facts. No I/O, no clock, no torch.

`docs/FORMAT.md` is the normative text; this package is one implementation of it.
"""
