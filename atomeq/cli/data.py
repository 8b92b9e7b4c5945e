"""``atomeq data list | download NAME``: public data sets into the folder that ATOMEQ_DATA names."""

import logging
import os
from collections.abc import Sequence

from atomeq.cli.terminal import Parser, say, show_table
from atomeq.data.ase_files import DATA_VARIABLE, DataError
from atomeq.data.download import DATA_SETS, download

_DESCRIPTION = f"""Public data sets for training and tests.

  atomeq data list
  atomeq data download acac --folder data

The folder is that of {DATA_VARIABLE} where --folder is not given."""


def main(argv: Sequence[str]) -> None:
    """Run ``data list`` or ``data download``.

    Args:
        argv: ``data`` and its arguments.

    Raises:
        DataError: An unknown set, no folder, or a source that cannot be reached.
    """
    parser = Parser("atomeq data", _DESCRIPTION)
    parser.add_argument("action", choices=("list", "download"), help="what to do")
    parser.add_argument("name", nargs="?", help="name of the set, from the list")
    parser.add_argument("--folder", type=str, help="where data sets are kept")
    parser.add_argument("--source", type=str, help="another address of the same files, a mirror")
    arguments = parser.parse_args(list(argv[1:]))
    if arguments.action == "list":
        rows = [[name, s.licence, s.source, str(len(s.files))] for name, s in DATA_SETS.items()]
        show_table(["set", "licence", "source", "files"], rows)
        return
    if arguments.name is None:
        raise DataError(f"name a data set to download: {', '.join(DATA_SETS)}")
    folder = arguments.folder or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(f"say where to put it: --folder FOLDER, or set {DATA_VARIABLE}")
    logging.getLogger("atomeq").setLevel(logging.INFO)
    paths = download(arguments.name, folder, source=arguments.source)
    say(f"{arguments.name}: {len(paths)} files in {paths[0].parent}")
