"""`python -m experiments.secret_number`."""

from datastore.console import run
from experiments.secret_number.commands import app


def main() -> None:
    """Run the command line of the experiment."""
    run(app)


if __name__ == "__main__":
    main()
