"""Snapshots linked over time: heads, snapshots, manifests and packs in a store. No torch."""
