"""`python -m everstep`."""

from everstep.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
