"""Training rows: `load_rows` reads the sources it is given, each a `DataSource`."""

from .rows import load_rows
from .sources import DataSource

__all__ = ["DataSource", "load_rows"]
