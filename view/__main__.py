"""`python -m view`."""

from datastore.console import run
from view.commands import app


def main() -> None:
    """Run the command line of view."""
    run(app)


if __name__ == "__main__":
    main()
