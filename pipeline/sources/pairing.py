"""Which image of a document an annotation is of, by id and by file name, where the two leave no doubt."""

from __future__ import annotations

from collections.abc import Iterable

from . import file_names
from .coco_json import Annotation, Image


class Pairs:
    """The images of one document.

    Args:
        images: in the document's order. Those of one file name are one image.
    """

    def __init__(self, images: Iterable[Image]):
        self._by_id: dict[str, dict[str | None, Image]] = {}
        self._by_path: dict[str, dict[str | None, Image]] = {}
        self._by_stem: dict[str, dict[str | None, Image]] = {}
        for image in images:
            if image.id is not None:
                self._by_id.setdefault(str(image.id), {}).setdefault(image.file_name, image)
            if image.file_name:
                path, stem = file_names.path_stem(image.file_name), file_names.stem(image.file_name)
                self._by_path.setdefault(path, {}).setdefault(image.file_name, image)
                self._by_stem.setdefault(stem, {}).setdefault(image.file_name, image)

    def find(self, annotation: Annotation) -> tuple[Image | None, str]:
        """The image of an annotation, None if there is none, and what makes it doubtful, "" if nothing does.

        An id counts if one image has it and the file name is not another image's. An id of several images, as
        merged releases have them, leaves the choice among these to the name.
        """
        number, name = annotation.image_id, annotation.file_name or ""
        same_id = {} if number is None else self._by_id.get(str(number), {})
        named = self._named(name)
        if not same_id:
            if len(named) > 1:
                return None, f"{name} may belong to {_listed(named)}; give it the image id of one of them"
            image = next(iter(named.values()), None)
            own, other = file_names.folder(name), file_names.folder(image.file_name or "") if image else ""
            return (None if own and other and own != other else image), ""
        both = {each: image for each, image in same_id.items() if each in named}
        if len(same_id) == 1 and (both or not named):
            return next(iter(same_id.values())), ""
        if len(both) == 1:
            return next(iter(both.values())), ""
        if len(same_id) > 1:
            return (
                None,
                f"{name}{': ' if name else ''}the image id {number} belongs to {_listed(same_id)}; give "
                "each image an id of its own",
            )
        what = f"has the name of {_listed(named)}, but the image id {number} of {_listed(same_id)}"
        return None, f"{name} {what}; correct one of them"

    def _named(self, name: str) -> dict[str | None, Image]:
        if not name:
            return {}
        exact = self._by_path.get(file_names.path_stem(name))
        return exact or self._by_stem.get(file_names.stem(name), {})


def _listed(images: dict[str | None, Image]) -> str:
    names = [str(name) for name in list(images)[:3]]
    return " and ".join(names) + (" and more" if len(images) > 3 else "")
