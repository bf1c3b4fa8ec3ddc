"""What the browser does for the page as a whole, as a Panel component: the browser side is static/browser.js."""

from pathlib import Path

import param
from panel.custom import JSComponent

__all__ = ["Browser"]


class Browser(JSComponent):
    """The address of the page, and names of its parts for a screen reader."""

    address = param.Boolean(default=True, doc="Write `query` into the address, and read it when the reader steps back.")
    query = param.String(default="", doc="Of the address, as ?store=run.zarr&rollout=71.")

    _esm = Path(__file__).with_name("static") / "browser.js"
