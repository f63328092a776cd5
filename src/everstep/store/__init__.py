"""Where bytes rest: put, get, list, delete."""
