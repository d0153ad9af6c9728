"""Files of every other kind, damaged by chance, and what reads them.

A reader may refuse a file by an error of ours, or read what is left of it; it may raise nothing else.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.model_training.evaluation.annotations import FILES, read_benchmark
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import log, reader, verify, work_list, work_list_table
from paracaption.pipeline.io import photos
from paracaption.pipeline.sources import categories, coco_json, label_maps
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.schemas.errors import ParaCaptionError
from paracaption.schemas.records import Blob, ImageRecord
from tests import odd_values
from tests.building import build, config_of
from tests.cases import damages, field_damages
from tests.synthetic import CATEGORIES, write_coconut, write_sa1b


class Case(NamedTuple):
    """A kind of file.

    Attributes:
        files: one of them is damaged; the first ones' folder is copied.
        read: what reads it, given its path in the copy.
        is_json: whether it can also be damaged as JSON.
    """

    files: list[Path]
    read: Callable[[Path], Any]
    is_json: bool = False


def damaged_file(seed: int, folder: Path) -> str:
    """Damage one file of one kind, and read it."""
    random = Random(seed)
    cases = _cases()
    name = random.choice(list(cases))
    case = cases[name]
    chosen = random.choice(case.files)
    if name in _WHOLE_CORPUS:
        copy = shutil.copytree(_home() / "out", folder / "copy")
        path = copy / chosen.relative_to(_home() / "out")
    else:
        copy = shutil.copytree(chosen.parent, folder / "copy")
        path = copy / chosen.name
    data, said = _damage(random, path.read_bytes(), case.is_json)
    path.write_bytes(data)
    try:
        case.read(path)
    except ParaCaptionError:
        return ""
    except Exception as error:
        raise AssertionError(f"{name}, {path.name}, {said}: {type(error).__name__}") from error
    return ""


_BYTES = (damages.cut, damages.flip, damages.flip, damages.zero, damages.insert, damages.replaced)
_BYTES += (damages.trailer, damages.compressed, damages.marked, damages.recoded)


def _damage(random: Random, data: bytes, is_json: bool) -> tuple[bytes, str]:
    if is_json and random.random() < 0.7:
        value = json.loads(data)
        for _ in range(random.randint(1, 3)):
            places = list(field_damages.places(value)) if isinstance(value, dict | list) else []
            if places and random.random() < 0.9:
                container, key = random.choice(places)
                container[key] = odd_values.json_value(random)
            elif random.random() < 0.3:
                value = odd_values.json_value(random)
        return json.dumps(value).encode("utf-8", "surrogatepass"), "as JSON"
    change = random.choice(_BYTES)
    return change(random, data), change.__name__


# What the kinds are made of, once a process.

_made: dict[str, Any] = {}


def _home() -> Path:
    """A folder with a small corpus and the sources that it is made of."""
    if "home" not in _made:
        _made["folder"] = tempfile.TemporaryDirectory()
        home = _made["home"] = Path(_made["folder"].name)
        coconut, sa1b = (
            write_coconut(home / "coconut", 2, 3, (48, 64)),
            write_sa1b(home / "sa1b", 2, 3, (48, 64)),
        )
        build(config_of(home / "out", coconut=coconut, sa1b=sa1b))
        with tarfile.open(sa1b["paths"][0]) as tar:
            tar.extractall(home / "pairs", filter="data")
        (home / "lists").mkdir()
        (home / "lists" / "categories.json").write_text(json.dumps(CATEGORIES))
        (home / "lists" / "build.yaml").write_text((home / "out" / "config.yaml").read_text())
        _write_instances(home)
        _write_benchmark(home)
    return _made["home"]


def _write_instances(home: Path) -> None:
    record = json.loads((home / "pairs" / "sa_0.json").read_text())
    annotations = [each | {"image_id": 1, "category_id": 1} for each in record["annotations"]]
    image = {"id": 1, "file_name": "sa_0.jpg", "width": 64, "height": 48}
    (home / "instances").mkdir()
    shutil.copy(home / "pairs" / "sa_0.jpg", home / "instances")
    content = {"images": [image], "annotations": annotations, "categories": CATEGORIES}
    (home / "instances" / "instances.json").write_text(json.dumps(content))


def _write_benchmark(home: Path) -> None:
    record = json.loads((home / "pairs" / "sa_0.json").read_text())
    masks = [each["segmentation"] for each in record["annotations"]]
    size = {"width": 64, "height": 48, "file_name": "sa_0.jpg"}
    asked = {"question": "Which?", "choices": [["a", 1], ["b", -1]], "type": "positive"}
    dlc = {
        "images": [{"id": 1, **size}],
        "annotations": [{"id": n, "image_id": 1, "segmentation": each} for n, each in enumerate(masks)],
    }
    listed = [{"index": number, "mask_rle": each} for number, each in enumerate(masks)]
    keyed = {"dlc": [str(n) for n in range(len(masks))], "paradlc": [f"7_{n}" for n in range(len(masks))]}
    paradlc = [{"image_id": 7, "annotations": listed, **size}]
    for kind, content in (("dlc", dlc), ("paradlc", paradlc)):
        folder = home / kind
        folder.mkdir()
        contents = {
            "annotations": content,
            "qa": {key: [asked] for key in keyed[kind]},
            "class_names": dict.fromkeys(keyed[kind], "cat"),
        }
        for name in FILES:
            (folder / name).write_text(json.dumps(contents[Path(name).stem]))


_WHOLE_CORPUS = {"log", "verify", "samples of a corpus", "plan"}


def _cases() -> dict[str, Case]:
    home = _home()
    out = home / "out"

    def all_of(pattern: str) -> list[Path]:
        found = sorted(home.glob(pattern))
        assert found, pattern
        return found

    def of_corpus(path: Path) -> Path:
        return next(each for each in path.parents if (each / "corpus.json").exists() or each.name == "copy")

    def regions_of(path: Path) -> Any:
        return read_photo_regions(path.parent / "sa_0.jpg", [path])

    corpus = [path for path in all_of("out/**/*") if path.is_file() and "events" not in path.parts]
    return {
        "evidence": Case(
            all_of("out/*/evidence/caption-*/*.parquet"),
            lambda path: EvidenceStore(path.parent, Captioned).load(path.stem),
        ),
        "ledger": Case(all_of("out/*/ledger/*.parquet"), reader.read_ledger),
        "work list": Case(all_of("out/*/plan/*.parquet"), lambda path: work_list_table.read_unit(path, 0)),
        "plan": Case(
            all_of("out/*/plan/*.json"), lambda path: work_list.find_work_list(path.parent.parent), True
        ),
        "manifest": Case(all_of("out/*/manifests/*.json"), reader.read_manifest, True),
        "log": Case(all_of("out/log/*.json"), lambda path: log.read_state(str(path.parent.parent))),
        "shard": Case(all_of("out/*/shards/*.tar"), lambda path: list(reader.iter_shard(path))),
        "configuration": Case([home / "lists" / "build.yaml"], load_config),
        "resolved configuration": Case([out / "config.yaml"], lambda path: reader.read_config(path.parent)),
        "samples of a corpus": Case(corpus, lambda path: _read_corpus(of_corpus(path))),
        "verify": Case(corpus, lambda path: verify.verify(of_corpus(path))),
        "categories": Case(
            [home / "lists" / "categories.json"], lambda path: categories.load_categories(str(path)), True
        ),
        "panoptic JSON": Case(
            all_of("coconut/*.json"), lambda path: coco_json.read_document(str(path)), True
        ),
        "regions of SA-1B": Case([home / "pairs" / "sa_0.json"], regions_of, True),
        "regions of instances": Case([home / "instances" / "instances.json"], regions_of, True),
        "regions of an image": Case([home / "pairs" / "sa_1.jpg"], regions_of),
        "label map": Case(all_of("coconut/labels/*.png"), _read_labels),
        "photo": Case(all_of("coconut/photos/*.jpg"), _read_photo),
        "benchmark dlc": Case([home / "dlc" / name for name in FILES], _benchmark("dlc"), True),
        "benchmark paradlc": Case([home / "paradlc" / name for name in FILES], _benchmark("paradlc"), True),
    }


def _benchmark(kind: Any) -> Callable[[Path], Any]:
    return lambda path: read_benchmark(path.parent, kind)


def _read_corpus(out: Path) -> None:
    corpus = reader.open_corpus(out)
    for _ in corpus.samples():
        pass


def _read_labels(path: Path) -> None:
    declared = [label_maps.Declared(number, None) for number in (1, 2, 3)]
    data = path.read_bytes()
    label_maps.label_map_size(data, "labels")
    label_maps.read_label_map(data, "labels", declared)


def _read_photo(path: Path) -> None:
    image = ImageRecord("a", "s", Blob(str(path)), 64, 48)
    photos.probe(Blob(str(path)), 10**6)
    photos.read_pixels(image, 10**6)
