"""`python -m capture`."""

from capture.commands import app
from datastore.console import run


def main() -> None:
    """Run the command line of capture."""
    run(app)


if __name__ == "__main__":
    main()
