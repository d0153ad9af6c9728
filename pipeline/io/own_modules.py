"""Classes of the user's own, named `module:Class`: installed, or in a file next to the configuration.

What Python finds without us keeps its meaning: a file next to the configuration never replaces a module of
the standard library or an installed one. Only the modules that are named, and those that their source
imports, can be imported from the folder. So a folder called `data` or `wandb` there is no package.

Their files are read once, when the class is first looked for. The driver runs what it has read, and hands it
to its workers (`taken`, `install`), so all run the same version, on nodes that do not have the folder, too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.errors import ConfigError, ParaCaptionError, one_line

MAX_BYTES = 16 << 20
"""Most bytes of one module with what it imports: every worker gets them."""

_MAX_FILES = 2_000
_OURS = __name__.partition(".")[0]
"""This package. In a clone it lies next to a configuration at the top, and is not the user's for that."""

_WITHOUT = ("__pycache__", ".pyc", ".pyo")


class OwnModule(msgspec.Struct, frozen=True):
    """A module or a package next to a configuration, as it was when it was first looked for.

    Attributes:
        name: the first part of its name.
        folder: where the configuration lies.
        files: what it consists of: the path from `folder`, with slashes -> the bytes.
    """

    name: str
    folder: str
    files: dict[str, bytes]


_home: list[Path] = []
_taken: dict[str, OwnModule] = {}
_places: dict[str, Path] = {}
"""Name of a module that was taken -> the folder that this process imports it from."""


def look_in(folder: str | Path) -> None:
    """From now on, look for modules that are not installed in this folder. Nothing is imported.

    A module that was read before is read again if this folder has one of its name: it may have changed.
    """
    _home[:] = [Path(folder).resolve()]
    for name, module in list(_taken.items()):
        moved = module.folder != str(_home[0])
        if _find(_home[0], name) is not None and (moved or not _is_same(_home[0], module)):
            _forget(name)


def taken() -> list[OwnModule]:
    """The modules of the user's own that this process has looked for, to be installed in its workers."""
    return list(_taken.values())


def install(modules: Iterable[OwnModule]) -> None:
    """Make modules that another process has taken importable in this one, also for processes it spawns.

    They are imported from their folder where this machine has them as they were, and else from a copy in the
    folder for temporary files.
    """
    for module in modules:
        if _taken.get(module.name) != module:
            _adopt(module, Path(module.folder) if _is_same(Path(module.folder), module) else _copy(module))
        copy = str(_copy(module))
        if copy not in sys.path:
            sys.path.append(copy)  # which is all that `multiprocessing` hands to the processes it spawns


def load_class(path: str, where: str) -> type[Any]:
    """Import a class, and what it is in.

    Args:
        path: `module:Class`, such as `mycap:MyCap` or `package.module:Class`.
        where: the key of the configuration that names it, for messages.

    Raises:
        ConfigError: there is no such module or class, or the module raises when it is imported.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(f"{where}: {path!r} is not the name of a class; write it as 'package.module:Class'")
    top = module.partition(".")[0]
    _take(top, where)
    try:
        found: Any = importlib.import_module(module)
    except ParaCaptionError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's module raises
        raise ConfigError(f"{where}: {path!r} {_why_not(module, top, error)}") from error
    source = getattr(found, "__file__", None) or "a built-in module"
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where}: {path!r}: {source} has no {part!r}{_hint(found, top)}")
        found = getattr(found, part)
    if not isinstance(found, type):
        raise ConfigError(
            f"{where}: {path!r}: {name} in {source} is not a class (it is a {type(found).__name__}); "
            "give the name of the class itself"
        )
    return found


def file_of(cls: type) -> str:
    """The file that has a class, for messages; the name of its module where there is none."""
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__


def _why_not(module: str, top: str, error: BaseException) -> str:
    """What an import failed with, where, and what to do."""
    place = _places.get(top)
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        if place is not None:
            return f"cannot be imported: {place / top} has no module {error.name}; correct the name"
        looked = f", and {_home[0]} has no {top}.py and no folder {top}" if _home else ""
        return (
            f"cannot be imported: no module {error.name!r} is installed{looked}; put it next to the "
            "configuration, install it, or correct the name"
        )
    file, line = _place_of(error)
    at = f" ({file}, line {line})" if file else ""
    advice = "correct the file"
    if isinstance(error, ModuleNotFoundError):
        advice = "install it on every node, or put it next to the configuration"
    elif not file:
        advice = "correct the name"
    what = f"SyntaxError: {error.msg}" if isinstance(error, SyntaxError) else one_line(error)
    return f"cannot be imported: {what}{at}; {advice}"


def _place_of(error: BaseException) -> tuple[str, int]:
    """File and line of what raised, outside of the import system and this file."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.filename, error.lineno or 0
    found, trace = ("", 0), error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name != __file__ and "importlib" not in name:
            found = name, trace.tb_lineno
        trace = trace.tb_next
    return found


def _hint(module: Any, top: str) -> str:
    """What else a module has, or that a file next to the configuration is hidden by an installed one."""
    hidden = _find(_home[0], top) if _home and top not in _taken else None
    if hidden is not None:
        return (
            f"; {hidden} is not looked at, because a module that is installed has the name {top!r}: rename it"
        )
    of_it = getattr(module, "__name__", "")
    names = [
        name
        for name, each in vars(module).items()
        if isinstance(each, type) and getattr(each, "__module__", "") == of_it
    ]
    return f"; it has {', '.join(sorted(names)[:10])}" if names else "; correct the name"


# What lies next to the configuration.


def _take(name: str, where: str) -> None:
    """Read a module of this name next to the configuration, unless one is installed or it was read."""
    if name in _taken or not _home or is_installed(name, _home[0]) or _find(_home[0], name) is None:
        return
    found = _read(_home[0], name)
    if found is not None:
        _adopt(found, _home[0])
    elif not _is_found(name):  # with the folder on PYTHONPATH it is, and each node has to have it there
        raise ConfigError(
            f"{where}: {_home[0] / name} holds more than {MAX_BYTES >> 20} MB or {_MAX_FILES:,} files, and "
            "every worker gets it; keep data elsewhere, and name its folder in the options"
        )


def _adopt(module: OwnModule, place: Path) -> None:
    _forget(module.name)
    _taken[module.name], _places[module.name] = module, place
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()


def _forget(name: str) -> None:
    """Forget a module and what it consists of, so that it is imported again."""
    module = _taken.pop(name, None)
    _places.pop(name, None)
    tops = {name} | {path.partition("/")[0].removesuffix(".py") for path in (module.files if module else ())}
    for loaded in [each for each in sys.modules if module and each.partition(".")[0] in tops]:
        del sys.modules[loaded]


def is_installed(name: str, folder: Path | None = None) -> bool:
    """Whether Python has a module of this name without us; a file of `folder` does not count."""
    if name == _OURS or name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return True
    if name in sys.modules and not _lies_in(folder, getattr(sys.modules[name], "__file__", None)):
        return True
    places = [place for place in sys.path if not _is_ours(place, folder)]
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            continue
        try:
            spec = finder.find_spec(name, places if finder is PathFinder else None)
        except Exception:  # noqa: BLE001 - another's finder that fails has not found it
            continue
        if spec is not None and spec.origin and not _lies_in(folder, spec.origin):
            return True  # without an origin it is a folder without __init__.py, which any folder is
    return False


def _lies_in(folder: Path | None, file: str | None) -> bool:
    """Whether a module's file, or that of a package, lies in this very folder."""
    return bool(folder and file) and folder in list(Path(file or "").resolve().parents)[:2]


def _is_ours(place: str, folder: Path | None) -> bool:
    path = Path(place or ".").resolve()
    return path == folder or path.parent == _copies()


def _is_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _find(folder: Path, name: str) -> Path | None:
    """The file or the folder of a module in a folder; as in Python, a package comes before a file."""
    for found in (folder / name / "__init__.py", folder / f"{name}.py"):
        if found.is_file():
            return found.parent if found.name == "__init__.py" else found
    return folder / name if (folder / name).is_dir() else None


def _read(folder: Path, name: str) -> OwnModule | None:
    """A module with all that its source imports from the same folder; None if that is too much."""
    files: dict[str, bytes] = {}
    waiting, seen = [name], {name}
    while waiting:
        found = _find(folder, waiting.pop())
        if found is None:
            continue
        for path in [found] if found.is_file() else _walk(found):
            key = path.relative_to(folder).as_posix()
            if sum(map(len, files.values())) + path.stat().st_size > MAX_BYTES or len(files) >= _MAX_FILES:
                return None
            files[key] = path.read_bytes()
            imported = _imports(files[key]) if key.endswith(".py") else set()
            new = {each for each in imported - seen if _is_file_or_package(folder, each)}
            seen |= new
            waiting += [each for each in sorted(new) if not is_installed(each, folder)]
    return OwnModule(name, str(folder), dict(sorted(files.items()))) if files else None


def _is_file_or_package(folder: Path, name: str) -> bool:
    found = _find(folder, name)
    return found is not None and (found.is_file() or any(found.glob("*.py")))


def _walk(folder: Path) -> Iterator[Path]:
    for inside, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in _WITHOUT and not each.startswith("."))
        for name in sorted(names):
            path = Path(inside) / name
            if not name.startswith(".") and not name.endswith(_WITHOUT) and path.is_file():
                yield path


def _imports(source: bytes) -> set[str]:
    """The first parts of the modules that a source imports, anywhere in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()  # importing it says so
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


# How they are imported.


class _Finder(MetaPathFinder):
    """Finds what was taken, and nothing else."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        owner = next((each for each in _taken.values() if _has(each, top)), None)
        if owner is None:
            return None
        spec = PathFinder.find_spec(fullname, [str(_places[owner.name])] if path is None else path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, owner)
        return spec


def _has(module: OwnModule, top: str) -> bool:
    return f"{top}.py" in module.files or any(path.startswith(f"{top}/") for path in module.files)


class _Loader(SourceFileLoader):
    """Runs the source that was read when the module was taken, whatever the file says by now."""

    def __init__(self, name: str, path: str, owner: OwnModule):
        super().__init__(name, path)
        self._owner = owner

    def get_data(self, path: str) -> bytes:
        place = _places.get(self._owner.name)
        inside = Path(path)
        if place is not None and inside.is_relative_to(place):
            given = self._owner.files.get(inside.relative_to(place).as_posix())
            if given is not None:
                return given
        return super().get_data(path)

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


# Copies for machines that do not have the folder.


def _copies() -> Path:
    return Path(tempfile.gettempdir()).resolve() / f"paracaption-modules-{os.getuid()}"


def _is_same(folder: Path, module: OwnModule) -> bool:
    """Whether a folder has all files of a module as they were."""
    try:
        return all((folder / path).read_bytes() == data for path, data in module.files.items())
    except OSError:
        return False


def _copy(module: OwnModule) -> Path:
    """A temporary folder that has the files of a module and nothing else; kept for other workers."""
    root = _copies()
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{root}: another user may write there, and code is run from it; remove it")
    place = root / hashlib.sha256(msgspec.msgpack.encode(module.files)).hexdigest()[:24]
    if _is_same(place, module):
        return place
    fresh = Path(tempfile.mkdtemp(dir=root, prefix="new-"))
    for path, data in module.files.items():
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        (fresh / path).write_bytes(data)
    try:
        fresh.rename(place)
    except OSError:  # another worker was faster, or somebody has changed what was there
        return place if _is_same(place, module) else fresh
    return place
