"""Labels: what a source says of a structure beside its atoms, its id for example, as columns."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from atomeq.screening.identity import printable
from atomeq.screening.rows import Row, info_fields

logger = logging.getLogger(__name__)

_ID_KEYS = ("id", "material_id", "identifier", "mp_id", "sid")  # where no key is named


class Labels:
    """Turns what a source says into the column ``id`` and those that were chosen.

    Args:
        id_key: Where the id is; by default the first there is of id, material_id, identifier,
            mp_id and sid.
        info: Keys that become columns, texts or, as ``band_gap:number``, numbers.

    Raises:
        ValueError: A key cannot be a column.
    """

    def __init__(self, id_key: str | None = None, info: Sequence[str] = ()) -> None:
        self.settings = {"id_key": id_key, "info": list(info)}
        self._fields = info_fields(info)
        self._id_keys = _ID_KEYS if id_key is None else (id_key,)
        self._unmet = {*([] if id_key is None else [id_key]), *(f.name for f in self._fields)}

    def __call__(self, about: Mapping[str, Any]) -> tuple[Row, str]:
        """Return the columns of a structure, and the complaint about what cannot be one.

        Args:
            about: What the source says of it.
        """
        self._unmet -= about.keys()
        named = (about[key] for key in self._id_keys if about.get(key) is not None)
        identifier = next(named, None)
        row: Row = {"id": None if identifier is None else printable(str(identifier))}
        complaint = ""
        for field in self._fields:
            value = about.get(field.name)
            try:
                row[field.name] = None if value is None else _convert(value, field.type)
            except (TypeError, ValueError):
                row[field.name] = None
                complaint = f"the info key {field.name!r} is {str(value)[:40]!r}, no number"
        return row, complaint

    def warn(self) -> None:
        """Tell of keys that were asked for and that no structure had."""
        if self._unmet:
            logger.warning("no structure has the info key %s", ", ".join(sorted(self._unmet)))


def _convert(value: Any, kind: pa.DataType) -> float | str:
    return float(value) if pa.types.is_floating(kind) else printable(str(value))
