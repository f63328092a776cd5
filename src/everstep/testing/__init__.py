"""The public testing kit: what authors of stores test theirs with. It needs pytest; the library does not."""
