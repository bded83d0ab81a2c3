"""``python -m tokred``: the command line."""

from tokred.cli.main import main

if __name__ == "__main__":
    main()
