"""``quantkit report``: a run as one HTML page."""
import typer


def command() -> None:
    """Placeholder while the page is being written."""
    raise typer.Exit(2)
