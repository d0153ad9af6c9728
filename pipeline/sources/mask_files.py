"""Which photo a mask file belongs to, by their names, where these leave no doubt."""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import file_names

_SEPARATOR = re.compile(r"[_.\-]")


class PhotoNames:
    """The photos of a source.

    Args:
        names: paths in their folders.
        photo_suffix: what the stems of photos end with and those of masks do not.
        mask_suffix: what the stems of masks end with.
    """

    def __init__(self, names: Iterable[str], photo_suffix: str = "", mask_suffix: str = ""):
        self._mask_suffix = mask_suffix
        self._by_stem: dict[str, list[str]] = {}
        for name in names:
            stem = file_names.compared_stem(name).removesuffix(photo_suffix)
            self._by_stem.setdefault(stem, []).append(name)

    def find(self, mask: str, is_whole: bool) -> tuple[str | None, str]:
        """The photo of a mask, None if there is none, and what makes it doubtful, "" if nothing does.

        A mask lies in a folder with its photo's name, or has that name, or has more behind it after `_`, `-`
        or `.`: then the longest photo's name counts. Of photos of one name in several folders, it is the one
        whose folder is the mask's.

        Args:
            mask: path of the mask in its folder.
            is_whole: whether the mask's name has to be the photo's.
        """
        folder, stem = file_names.folder(mask), file_names.compared_stem(mask)
        tried = [(stem.removesuffix(self._mask_suffix), folder)]
        if not is_whole:
            ends = [match.start() for match in _SEPARATOR.finditer(tried[0][0])]
            tried += [(tried[0][0][:end], folder) for end in reversed(ends)]
            if folder:
                tried.insert(0, (file_names.plain(file_names.base_name(folder)), file_names.folder(folder)))
        for name, place in tried:
            found = self._by_stem.get(name, [])
            if len(found) > 1:
                found = [each for each in found if file_names.folder(each) == place]
                if len(found) != 1:
                    listed = " and ".join(self._by_stem[name][:3])
                    return None, f"{mask} may be of {listed}; put it into a folder like its photo's"
            if found:
                return found[0], ""
        return None, ""
