"""`python -m loquetier` is `loquetier`."""

from loquetier.cli import main

if __name__ == "__main__":
    main()
