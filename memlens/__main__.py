"""`python -m memlens` is the command line."""

from memlens.cli import main

if __name__ == "__main__":
    main()
