"""`python -m memlens` is the command line."""

from memlens.cli.app import main

if __name__ == "__main__":
    main()
