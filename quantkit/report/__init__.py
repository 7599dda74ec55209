"""A run as one HTML page: the verdict first, then everything that it rests on.

    page = render(read_run("out.run"))

The page is self-contained: inline CSS, inline SVG, no script, nothing loaded from anywhere.
Imports only `quantkit.errors` and `quantkit.results`, so a report can be made where no model
can be loaded.
"""

from quantkit.report.history import read_history
from quantkit.report.page import render
from quantkit.report.run_folder import Run, read_run

__all__ = ["Run", "read_history", "read_run", "render"]
