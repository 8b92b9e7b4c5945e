"""Classes that a file may name: those of this package, and those that other distributions offer.

Nothing that a file names is imported but what is found here, so a file that was loaded cannot run
code of its choice. No list is kept: a class of the package is found by its module, one of another
distribution by the entry point that its author wrote.
"""

import difflib
import inspect
import logging
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Generic, TypeGuard, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class RegistryError(ValueError):
    """A name that is not registered, or a registration that does not hold what it says."""


class Registry(Generic[T]):
    """The subclasses of a class that files may name, by path or by the name of the class alone.

    A path as ``atomeq.models.egnn.EGNN`` is looked for in the one module that it names.

    Args:
        kind: What they are, for messages.
        base: What every one is a subclass of.
        package: Whose modules define those of atomeq.
        group: Entry points of other distributions; each names where its class is defined.

    Example:
        >>> from atomeq.models.registry import MODELS
        >>> MODELS.find("atomeq.models.egnn.EGNN").__name__
        'EGNN'
    """

    def __init__(self, kind: str, base: type[T], *, package: str, group: str) -> None:
        self.kind = kind
        self.base = base
        self.package = package
        self.group = group

    def find(self, path: object) -> type[T]:
        """Return the class of a name, importing its module and no other.

        Args:
            path: ``module.Class``, or ``Class`` where only one has this name.

        Raises:
            RegistryError: Nothing is registered under it, or what is registered is something else.
        """
        if isinstance(path, str) and "." not in path:
            path = self._path_of(path)
        module, _, name = str(path).rpartition(".")
        if module in self._modules():
            found = getattr(import_module(module), name, None)
            if self._is_one(found) and path_of(found) == path:
                return found
        elif entry := self._offers().get(str(path)):
            return self._load(entry)
        raise RegistryError(f"the {self.kind} {path!r} is not registered{self._suggestion(path)}")

    def refuse_unregistered(self, one: T) -> None:
        """Raise :class:`RegistryError` where a file could not name the class of an object."""
        path = path_of(type(one))
        if self.find(path) is not type(one):
            raise RegistryError(f"{path} is not the class that is registered under this name")

    def paths(self) -> list[str]:
        """Return the paths of all there are; imports the package's modules, and no others."""
        built_in = [
            path_of(value)
            for module in self._modules()
            for value in vars(import_module(module)).values()
            if self._is_one(value) and value.__module__ == module
        ]
        return sorted({*built_in, *self._offers()})

    def import_all(self) -> list[type[T]]:
        """Import and return all there are; what another distribution has broken is a warning."""
        found = []
        for path in self.paths():
            try:
                found.append(self.find(path))
            except RegistryError as error:
                logger.warning("%s", error)
        return found

    def _modules(self) -> list[str]:
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec is not None else None
        return [f"{self.package}.{module.name}" for module in iter_modules(folders)]

    def _offers(self) -> dict[str, EntryPoint]:
        return {f"{entry.module}.{entry.attr}": entry for entry in entry_points(group=self.group)}

    def _load(self, entry: EntryPoint) -> type[T]:
        origin = f"{distribution_of(entry)} offers {entry.value!r} as a {self.kind}"
        try:
            found = entry.load()
        except Exception as error:  # the code of another distribution may raise anything
            raise RegistryError(f"{origin}, but importing it raised {error!r}") from error
        if not self._is_one(found):
            raise RegistryError(f"{origin}, but it is no subclass of {self.base.__name__}")
        if path_of(found) != f"{entry.module}.{entry.attr}":
            raise RegistryError(f"{origin}; its entry point has to name {path_of(found)}")
        return found

    def _is_one(self, value: object) -> TypeGuard[type[T]]:
        return (
            inspect.isclass(value)
            and issubclass(value, self.base)
            and value is not self.base
            and not inspect.isabstract(value)
        )

    def _path_of(self, name: str) -> str:
        found = [path for path in self.paths() if path.rpartition(".")[2] == name]
        if len(found) > 1:
            raise RegistryError(f"{name} may be any of {', '.join(found)}: give the whole path")
        return found[0] if found else name

    def _suggestion(self, path: object) -> str:
        paths = self.paths()
        by_name = {known.rpartition(".")[2]: known for known in paths}
        close = difflib.get_close_matches(str(path).rpartition(".")[2], by_name, n=1)
        if close:
            return f"; did you mean {by_name[close[0]]!r}?"
        return (
            f"; there are {', '.join(paths)}, and a distribution of your own offers another one "
            f"by an entry point of the group {self.group!r}"
        )


def path_of(found: type) -> str:
    """Return the path under which a class is registered: where it is defined."""
    return f"{found.__module__}.{found.__qualname__}"


def distribution_of(entry: EntryPoint) -> str:
    """Return the name of the distribution that an entry point belongs to."""
    return entry.dist.name if entry.dist is not None else "a distribution"
