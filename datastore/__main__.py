"""`python -m datastore`."""

from datastore.commands import app
from datastore.console import run


def main() -> None:
    """Run the command line of the store."""
    run(app)


if __name__ == "__main__":
    main()
