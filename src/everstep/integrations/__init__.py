"""Bridges to what other programs read and write, one file each. Nothing below imports these."""
