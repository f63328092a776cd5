"""While training runs: the one object a loop holds, when to take snapshots, and how a run is resumed."""
