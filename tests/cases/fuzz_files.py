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
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from starlette.testclient import TestClient

from paracaption.model_training.data.conversation_records import read_records
from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.model_training.evaluation import run_benchmark
from paracaption.model_training.evaluation.annotations import FILES, read_benchmark
from paracaption.pipeline.config_file import load_config, load_evaluation, load_training
from paracaption.pipeline.corpus import (
    export,
    inspect,
    log,
    merge,
    reader,
    status,
    verify,
    versions,
    work_list_summary,
    work_list_table,
)
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.io import photos
from paracaption.pipeline.sources import categories, coco_json, label_maps
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ParaCaptionError
from paracaption.schemas.evaluation import Bench, Judge
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
        parse: what makes values of its bytes, if it is JSON, lines of JSON or YAML; damaged as such, too.
    """

    files: list[Path]
    read: Callable[[Path], Any]
    parse: Callable[[bytes], Any] | None = None


def damaged_file(seed: int, folder: Path) -> str:
    """Damage one file of one kind, and read it."""
    random = Random(seed)
    cases = _cases()
    name = random.choice(list(cases))
    case = cases[name]
    chosen = random.choice(case.files)
    if chosen.is_relative_to(_home() / "out"):
        copy = shutil.copytree(_home() / "out", folder / "copy")
        path = copy / chosen.relative_to(_home() / "out")
    else:
        copy = shutil.copytree(chosen.parent, folder / "copy")
        path = copy / chosen.name
    data, said = _damage(random, path.read_bytes(), case.parse)
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


def _damage(random: Random, data: bytes, parse: Callable[[bytes], Any] | None) -> tuple[bytes, str]:
    if parse is not None and random.random() < 0.7:
        value = parse(data)
        for _ in range(random.randint(1, 3)):
            places = list(field_damages.places(value)) if isinstance(value, dict | list) else []
            if places and random.random() < 0.9:
                container, key = random.choice(places)
                container[key] = odd_values.json_value(random)
            elif random.random() < 0.3:
                value = odd_values.json_value(random)
        if random.random() < 0.05:
            value = {"deep": 0}
        text = _lines_of(value) if parse is _lines else json.dumps(value)
        text = text.replace(
            '{"deep": 0}', random.choice(("[", '{"a":')) * random.choice((200, 2_000, 100_000))
        )
        return text.encode("utf-8", "surrogatepass"), "by its values"
    change = random.choice(_BYTES)
    return change(random, data), change.__name__


_DEEP = {"deep": 0}
"""In the place of what is nested so deeply that nothing can write it."""


def _lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def _lines_of(value: Any) -> str:
    return "".join(f"{json.dumps(each)}\n" for each in (value if isinstance(value, list) else [value]))


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
        _made["config"] = config_of(home / "out", coconut=coconut, sa1b=sa1b)
        build(_made["config"])
        _made["regions"] = 2 * 2 * 3
        with tarfile.open(sa1b["paths"][0]) as tar:
            tar.extractall(home / "pairs", filter="data")
        with patch.object(merge.plots, "draw_plots", lambda _: dict.fromkeys(merge.plots.NAMES, b"")):
            merge.merge(home / "out")  # nothing reads the plots, and drawing them takes seconds
        _write_lists(home)
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
        (folder / "results").mkdir(parents=True)
        contents = {
            "annotations": content,
            "qa": {key: [asked] for key in keyed[kind]},
            "class_names": dict.fromkeys(keyed[kind], "cat"),
        }
        for name in FILES:
            (folder / name).write_text(json.dumps(contents[Path(name).stem]))
        captions = dict.fromkeys(keyed[kind], "A cat on a mat.")
        (folder / "captions.json").write_text(json.dumps(captions))
    shutil.copytree(home / "dlc", home / "results")
    bench = Bench(name="dlc", kind="dlc", folder=str(home / "results"))
    _caption_again(bench, home / "results" / "captions.json", home / "results" / "results")
    answers = [{"digest": "x", "key": "0", "question": 0, "answer": "A"}]
    (home / "results" / "results" / run_benchmark.ANSWERS).write_text(_lines_of(answers))


def _caption_again(bench: Bench, predictions: Path, folder: Path) -> None:
    backend = Backend(name="predictions", options={"path": str(predictions)})
    run_benchmark.caption_images(bench, backend, folder)


def _configurations(folder: Path) -> dict[str, Case]:
    read = {"build": load_config, "train": load_training, "evaluate": load_evaluation}
    return {
        f"configuration of {kind}": Case([folder / f"{kind}.yaml"], load, yaml.safe_load)
        for kind, load in read.items()
    }


def _of_models(home: Path) -> dict[str, Case]:
    """What training, evaluation and captioning read."""

    def records_of(path: Path) -> Any:
        return list(read_records(str(path), 4.0))

    def score(path: Path) -> Any:
        bench = Bench(name="dlc", kind="dlc", folder=str(path.parent.parent))
        run_benchmark.score_answers(bench, Judge(name="openai", options=_SERVED), path.parent)

    def predict(path: Path) -> Any:
        bench = Bench(name="dlc", kind="dlc", folder=str(path.parent))
        _caption_again(bench, path, path.parent / "again")

    def masks_of(path: Path) -> Any:
        return read_photo_regions(home / "pairs" / "sa_0.jpg", [path])

    def panoptic_of(path: Path) -> Any:
        return read_photo_regions(sorted((path.parent / "photos").glob("*.jpg"))[0], [path])

    records, pictures = home / "records", sorted((home / "pictures").iterdir())
    results = home / "results" / "results"
    return {
        "records for training": Case([records / "talk.json"], records_of, json.loads),
        "lines for training": Case([records / "talk.jsonl"], records_of, _lines),
        "table for training": Case([records / "talk.parquet"], records_of),
        "predictions": Case([home / "dlc" / "captions.json"], predict, json.loads),
        "captions of an evaluation": Case([results / run_benchmark.CAPTIONS], score, _lines),
        "answers of an evaluation": Case([results / run_benchmark.ANSWERS], score, _lines),
        "mask of a region": Case(pictures, masks_of),
        "photo of every kind": Case(pictures, _read_photo),
        "panoptic of a photo": Case(sorted((home / "coconut").glob("*.json")), panoptic_of, json.loads),
    }


_SERVED = {"model": "tiny", "base_url": "http://127.0.0.1:9/v1"}


def _write_lists(home: Path) -> None:
    """Configurations, records for training, predictions, and photos and masks of every kind."""
    (home / "lists").mkdir()
    (home / "lists" / "categories.json").write_text(json.dumps(CATEGORIES))
    (home / "lists" / "build.yaml").write_text((home / "out" / "config.yaml").read_text())
    for kind in ("train", "evaluate"):
        example = sorted((Path(__file__).parents[2] / "configs" / kind).glob("*.yaml"))[0]
        (home / "lists" / f"{kind}.yaml").write_text(example.read_text())
    record = json.loads((home / "pairs" / "sa_0.json").read_text())
    masks = [each["segmentation"] for each in record["annotations"]]
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    talk = [
        {"id": 1, "image": "sa_0.jpg", "conversations": turns},
        {
            "id": "b",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}],
        },
        {"image": "sa_0.jpg", "mask_rles": masks, "captions": ["A cat."] * len(masks)},
    ]
    (home / "records").mkdir()
    (home / "records" / "talk.json").write_text(json.dumps(talk))
    (home / "records" / "talk.jsonl").write_text(_lines_of(talk))
    pq.write_table(pa.Table.from_pylist(talk[:1]), home / "records" / "talk.parquet")
    photo = Image.open(home / "pairs" / "sa_0.jpg").convert("RGB")
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 8)
    mask = photo.convert("L").point([0] * 128 + [255] * 128)
    (home / "pictures").mkdir()
    images: list[tuple[Image.Image, str]] = [
        *((photo, kind) for kind in ("PNG", "WEBP", "TIFF", "BMP", "JPEG", "GIF")),
        *((deep, "PNG"), (deep, "TIFF"), (photo.convert("CMYK"), "JPEG"), (photo.convert("P"), "PNG")),
        *((photo.convert("RGBA"), "PNG"), (mask, "PNG"), (mask.convert("1"), "TIFF"), (mask, "GIF")),
    ]
    for number, (image, kind) in enumerate(images):
        image.save(home / "pictures" / f"{number}.{kind.lower()}", kind)


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

    corpus = [path for path in all_of("out/**/*") if path.is_file()]
    return {
        "evidence": Case(
            all_of("out/*/evidence/caption-*/*.parquet"),
            lambda path: EvidenceStore(path.parent, Captioned).load(path.stem),
        ),
        "ledger": Case(all_of("out/*/ledger/*.parquet"), reader.read_ledger),
        "work list": Case(all_of("out/*/plan/*.parquet"), lambda path: work_list_table.read_unit(path, 0)),
        "plan": Case(
            all_of("out/*/plan/*.json"),
            lambda path: work_list_summary.find_work_list(path.parent.parent),
            json.loads,
        ),
        "manifest": Case(all_of("out/*/manifests/*.json"), reader.read_manifest, json.loads),
        "log": Case(all_of("out/log/*.json"), lambda path: log.read_state(str(path.parent.parent))),
        "shard": Case(all_of("out/*/shards/*.tar"), lambda path: list(reader.iter_shard(path))),
        **_configurations(home / "lists"),
        **_of_models(home),
        "resolved configuration": Case([out / "config.yaml"], lambda path: reader.read_config(path.parent)),
        "samples of a corpus": Case(corpus, lambda path: _read_corpus(of_corpus(path))),
        "export": Case(corpus, lambda path: _export(of_corpus(path))),
        "inspect": Case(corpus, lambda path: inspect.inspect(of_corpus(path))),
        "pages": Case(corpus, lambda path: _explore(of_corpus(path))),
        "versions": Case(corpus, lambda path: _look_back(of_corpus(path))),
        "resume": Case(corpus, lambda path: _resume(of_corpus(path))),
        "verify": Case(corpus, lambda path: verify.verify(of_corpus(path))),
        "categories": Case(
            [home / "lists" / "categories.json"],
            lambda path: categories.load_categories(str(path)),
            json.loads,
        ),
        "panoptic JSON": Case(
            all_of("coconut/*.json"), lambda path: coco_json.read_document(str(path)), json.loads
        ),
        "regions of SA-1B": Case([home / "pairs" / "sa_0.json"], regions_of, json.loads),
        "regions of instances": Case([home / "instances" / "instances.json"], regions_of, json.loads),
        "regions of an image": Case([home / "pairs" / "sa_1.jpg"], regions_of),
        "label map": Case(all_of("coconut/labels/*.png"), _read_labels),
        "photo": Case(all_of("coconut/photos/*.jpg"), _read_photo),
        **{f"benchmark {kind}": _benchmark(home / kind, kind) for kind in ("dlc", "paradlc")},
    }


def _benchmark(folder: Path, kind: Any) -> Case:
    files = [folder / name for name in FILES]
    return Case(files, lambda path: read_benchmark(path.parent, kind), json.loads)


def _read_categories(path: Path) -> None:
    categories.load_categories(str(path))


def _read_corpus(out: Path) -> None:
    corpus = reader.open_corpus(out)
    for _ in corpus.samples():
        pass


def _export(out: Path) -> None:
    for kind in export.FORMATS:
        export.export(out, kind, out.parent / kind)


def _explore(out: Path) -> None:
    """Pages of a damaged corpus are pages, not internal errors."""
    client = TestClient(make_app(Explorer(out)), base_url="http://localhost", follow_redirects=False)
    subset, key = "sa1b", "sa_0"
    for url in ("/", "/browse", "/whatif", "/review", f"/distributions/{subset}"):
        client.get(url)
    for what in ("image", "photo", "thumb"):
        client.get(f"/{what}/{subset}/{key}")


def _look_back(out: Path) -> None:
    list(versions.list_versions(str(out), True))
    status.Watcher(str(out)).read()


def _resume(out: Path) -> None:
    """A build of what is there goes on, or says why not; what it finishes has every region."""
    build(_made["config"].model_copy(update={"out": str(out)}))
    found = [reader.read_ledger(path) for path in sorted(out.glob("*/ledger/*.parquet"))]
    rows = [row for table in found for row in table.to_pylist()]
    assert len(rows) == _made["regions"] and all(row["kept"] or row["drop_reason"] for row in rows)


def _read_labels(path: Path) -> None:
    declared = [label_maps.Declared(number, None) for number in (1, 2, 3)]
    data = path.read_bytes()
    label_maps.label_map_size(data, "labels")
    label_maps.read_label_map(data, "labels", declared)


def _read_photo(path: Path) -> None:
    image = ImageRecord("a", "s", Blob(str(path)), 64, 48)
    photos.probe(Blob(str(path)), 10**6)
    photos.read_pixels(image, 10**6)
