"""`python -m cmfast`: the `cmfast` command."""

from .cli import main

if __name__ == "__main__":
    main()
