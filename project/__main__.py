"""`python -m project`."""

from datastore.console import run
from project.commands import app


def main() -> None:
    """Run the command line of project."""
    run(app)


if __name__ == "__main__":
    main()
