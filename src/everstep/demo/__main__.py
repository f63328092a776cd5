"""`python -m everstep.demo`."""

from everstep.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
