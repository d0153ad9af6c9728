"""The dataset card, `OUT/README.md`, in the form that hubs read: from the statistics and the config."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import yaml

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.published import published
from ...schemas.records import SCORES
from ..io.location import is_bucket
from ..sources.protocols import SOURCE_STAGE
from ..sources.registry import open_source, subset_title
from ..stages.recipes import members_of, stage_kinds
from ..stages.registry import STAGES, known_stage
from .shard_pipes import PIPES

if TYPE_CHECKING:
    from ...schemas.summary import CorpusSummary, SubsetCounts, SubsetSummary

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_SIZES += ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))
_SHOWN_CATEGORIES = 20
TITLE = "Region captions"
PER_SOURCE = "per-source"
"""The name of a license that differs from source to source."""

SUBJECT = {
    "language": ["en"],
    "task_categories": ["image-to-text", "image-segmentation"],
    "tags": ["region-captioning", "dense-captioning", "masks", "webdataset"],
}
"""What every corpus is about, in the words of the hub."""

_LINK = re.compile(r"(?:https?|ftp)://[^\s<>|]+")


def render_card(summary: CorpusSummary, config: BuildConfig) -> str:
    """The card as Markdown, from a corpus's statistics and configuration. Equal ones give an equal card."""
    parts = [
        _front_matter(summary, config.out),
        _head(summary),
        *(_subset(name, subset) for name, subset in summary.subsets.items()),
        steps(summary, config),
        _pictures(),
        _licenses(config, summary),
        _reading(summary, config.out),
        configuration(config, summary),
    ]
    return "\n".join(parts)


def _front_matter(summary: CorpusSummary, out: str) -> str:
    filled = [name for name, subset in summary.subsets.items() if subset.counts.images_captioned]
    files = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/shards/{name}-*.tar"}]}
        for name in filled
    ]
    values = {
        "pretty_name": TITLE,
        "license": "other",
        "license_name": PER_SOURCE,
        "license_link": "#licenses",
        **SUBJECT,
        "size_categories": [size_category(summary.images_captioned)],
        "configs": files,
    }
    if is_bucket(out):  # where a pattern would name files of earlier versions, too
        del values["configs"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def size_category(images: int) -> str:
    """The hub's name for a range of numbers, of the one that has this number of images."""
    return next((name for limit, name in _SIZES if images < limit), "n>100M")


def _head(summary: CorpusSummary) -> str:
    rows = [
        (
            subset_title(name),
            subset.counts.units,
            subset.counts.images,
            subset.counts.images_captioned,
            subset.counts.regions,
            subset.counts.kept,
            _share(subset.counts.kept, subset.counts.regions),
        )
        for name, subset in summary.subsets.items()
    ]
    if len(rows) > 1:
        units = sum(subset.counts.units for subset in summary.subsets.values())
        share = _share(summary.kept, summary.regions)
        totals = (units, summary.images, summary.images_captioned, summary.regions, summary.kept, share)
        rows.append(("together", *totals))
    header = ("subset", "units", "images", "with captions", "regions in the source", "kept", "share kept")
    summed_up = (
        f"{count_of(summary.kept, 'region')} of {count_of(summary.images_captioned, 'image')}, each with its "
        "mask and a checked caption. Made with ParaCaption. A unit is one shard of images.\n"
    )
    return f"# Region captions\n\n{summed_up}\n" + table(header, rows)


def _subset(name: str, subset: SubsetSummary) -> str:
    counts = subset.counts
    text = [
        f"\n## {subset_title(name)}\n",
        "The table counts how many regions each step dropped, and why. Every region of the source is also in "
        f"the ledger (`{name}/ledger/`), kept or dropped with its reason.\n",
        funnel(counts),
    ]
    if counts.images_dropped:
        dropped = ", ".join(f"{reason} {number:,}" for reason, number in counts.images_dropped.items())
        text.append(f"Images dropped as a whole: {dropped}.\n")
    if images := counts.benchmark_photos:
        text.append(
            "Left out because they are photos of ParaDLC-Bench or DLC-Bench (`benchmark_photo`): "
            f"{count_of(images, 'image')}.\n"
        )
    if images := counts.images_held_out:
        held = f"{count_of(images, 'image')} with {count_of(counts.kept_held_out, 'region')}"
        text.append(f"Held out of training (`split` in the index): {held}.\n")
    if subset.categories:
        shown = ", ".join(
            f"{category or '(none)'} {number:,}" for category, number in subset.categories[:_SHOWN_CATEGORIES]
        )
        text.append(f"Categories: {subset.num_categories:,}; most frequent: {plain(shown)}.\n")
    words, each = subset.caption_words, subset.regions_per_image
    if words.total:
        text.append(
            f"Captions have {words.mean:.1f} words on average (median {words.quantile(0.5)}); "
            f"images have {each.mean:.1f} regions on average.\n"
        )
    return "\n".join(text)


def funnel(counts: SubsetCounts) -> str:
    """The table of the regions that each step dropped, and why."""
    rows = []
    for step in counts.funnel:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in step.reasons.items())
        left = step.regions_in - step.dropped
        rows.append((step.stage, step.regions_in, step.dropped, left, _share(left, counts.regions), reasons))
    return table(("step", "regions in", "dropped", "left", "of all", "reasons"), rows)


def steps(summary: CorpusSummary, config: BuildConfig) -> str:
    """What the steps do that some subset has gone through, and the members of those that have some."""
    what = {SOURCE_STAGE: "reads the photo and its masks, and drops what is missing or damaged"}
    taken = {step.stage for subset in summary.subsets.values() for step in subset.counts.funnel}
    kinds = dict.fromkeys(STAGES) | {name: name for name in STAGES}
    inside: dict[str, list[str]] = {}
    for subset in config.subsets:
        with suppress(ConfigError):  # a recipe that only whoever built the corpus has
            kinds |= stage_kinds(config, subset)
            inside |= members_of(config, subset)
    what |= {name: _does(name, kind or name, inside.get(name, [])) for name, kind in kinds.items()}
    shown = [*taken, *(each for name in taken for each in _all_inside(name, inside))]
    lines = [f"- `{name}` {text}" for name, text in what.items() if name in shown and text]
    return "\n## Steps\n\n" + "\n".join(lines) + "\n" if lines else ""


def _does(name: str, kind: str, members: Sequence[str]) -> str:
    """What a stage does: in its kind's words; of one of the user's own only its kind is known."""
    stage = known_stage(kind)
    does = stage.does if stage else f"is a stage of its own, `{kind}`"
    named = f" (`{kind}`)" if stage and kind != name else ""
    inner = f": {', '.join(f'`{each}`' for each in members)}" if members else ""
    return f"{does}{named}{inner}" if does else ""


def _all_inside(name: str, inside: dict[str, list[str]]) -> list[str]:
    found = inside.get(name, [])
    return [*found, *(each for member in found for each in _all_inside(member, inside))]


def _pictures() -> str:
    names = ("funnel", "caption_words", "regions_per_image", "mask_area")
    return "\n" + "\n".join(f"![{name.replace('_', ' ')}](plots/{name}.png)\n" for name in names)


def _licenses(config: BuildConfig, summary: CorpusSummary) -> str:
    return (
        "## Licenses\n\nPhotos and masks stay under the licenses of their publishers. Captions were "
        "generated by the models that the configuration below names; the terms of those models apply.\n\n"
        + license_tables(config, summary)
    )


def license_tables(config: BuildConfig, summary: CorpusSummary, index: str = "index.parquet") -> str:
    """The license of each source, and how many images are under which license; `index` names the rest."""
    rows = []
    for subset in config.subsets:
        for places, license in sources_of(config, subset):
            rows.append((subset_title(subset), f"`{places}`", plain(license)))
    return table(("subset", "source", "license"), rows) + _license_counts(summary, index)


def _license_counts(summary: CorpusSummary, index: str) -> str:
    """How many images are under each license, where the records of the images name theirs."""
    rows, left = [], []
    for name, subset in summary.subsets.items():
        for each in subset.licenses:
            url = each.license_url if each.license_url != each.license else ""
            named = plain(each.license) or "(none stated)"
            rows.append((subset_title(name), named, f"<{url}>" if _LINK.fullmatch(url) else "", each.images))
        if more := subset.num_licenses - sum(each.license != "" for each in subset.licenses):
            left.append(f"{subset_title(name)}: {more:,} more licenses, each with fewer images.\n")
    if not rows:
        return ""
    return (
        "\nThe table counts the captioned images under each license, as the publisher's records state it. "
        "The license, author and URLs of each photo, where they are stated, are in its JSON and in "
        f"`{index}`.\n\n" + table(("subset", "license", "address", "images"), rows) + "".join(left)
    )


def sources_of(config: BuildConfig, subset: str) -> list[tuple[str, str]]:
    """Where each source of a subset lies, and its license; a kind that is not registered here says less."""
    try:
        found = open_source(config, subset).sources
    except ConfigError:
        entries = config.subsets[subset].sources
        return [(entry["source"], str(entry.get("license", "unknown"))) for entry in entries]
    return [
        (", ".join(map(published, source.places())), published(source.options.license)) for source in found
    ]


_SPLITS = """
Shards hold the images of both splits, and `split="train"` above loads all of them. The column `split` of
`index.parquet` says whether an image is for training (`train`) or for evaluation (`held_out`). Do not train
on held-out images:

```python
import pyarrow.parquet as pq

chosen = [("subset", "=", "{name}"), ("split", "=", "train")]
keys = set(pq.read_table("index.parquet", columns=["key"], filters=chosen)["key"].to_pylist())
data = data.filter(lambda sample: sample["__key__"] in keys)
```
"""


def _splits_in_bucket(out: str) -> str:
    """The same text, with code that finds the index by the commit log."""
    before, _, after = _SPLITS.partition("import pyarrow.parquet")
    scheme = out.partition("://")[0]
    return (
        f'{before}corpus = paracaption.open_corpus("{scheme}://BUCKET/CORPUS")\n'
        'rows = [row for table in corpus.index(["subset", "key", "split"]) for row in table.to_pylist()]\n'
        'keys = {{row["key"] for row in rows if (row["subset"], row["split"]) == ("{name}", "train")}}\n'
        f"{after[after.index('data = data.filter') :]}"
    )


def _reading(summary: CorpusSummary, out: str) -> str:
    filled = [name for name, subset in summary.subsets.items() if subset.counts.images_captioned]
    name = (filled or list(summary.subsets))[0]
    scores = "\n".join(f"- `{score}`: {meaning}" for score, meaning in SCORES.items())
    splits = _SPLITS if summary.held_out_share else ""
    splits = (splits and _splits_in_bucket(out) if is_bucket(out) else splits).format(name=name)
    examples, layout = _in_bucket(name, out, splits) if is_bucket(out) else _in_folder(name, splits)
    return f"""
## Reading it

Each shard is a plain tar in WebDataset form. `<key>.jpg` is the publisher's photo, not encoded again (the
name always ends in `.jpg`; `photo_format` says which format it is). `<key>.json` has the regions of the image
with `rle` (COCO's compressed RLE), `bbox` (x, y, width, height), `area`, `category` (which the source
annotates), `core_category` (which the judge named from the caption, if it was asked) and `caption`.

Masks fit the pixels as stored, so do not rotate the photo. Where the publisher's photo had an EXIF
orientation, the tag was set to upright, and `exif_orientation` in the JSON has its former value. Nothing else
in the bytes of the photo was changed.

Where the publisher's records state them, the JSON has the photo's `license`, `license_url`, `license_id`,
`attribution`, `author`, `author_url`, `title`, `source_url`, `coco_url` and `flickr_url`.

{examples}
```python
from pycocotools import mask

pixels = mask.decode(record["regions"][0]["rle"])  # (height, width) of 0 and 1, for the photo as stored
```

| file | what it is |
| --- | --- |
| `index.parquet` | a row per kept region: caption, category, box, scores, and the place of its sample |
| `<subset>/shards/<unit>.tar` | the samples |
| `<subset>/ledger/<unit>.parquet` | every region of the source, kept or dropped and why, with scores |
| `<subset>/manifests/<unit>.json` | the commit record of the unit; ignore a shard that has none |
| `stats.json`, `plots/` | the numbers and pictures of this card |

{layout}
A region has a score only if the step that computes the score has seen the region. The scores are:

{scores}
"""


def _in_folder(name: str, splits: str) -> tuple[str, str]:
    """How a corpus in a folder is read with webdataset and datasets, and what lies where."""
    examples = f"""```python
import glob, json
import webdataset as wds

for sample in wds.WebDataset(sorted(glob.glob("{name}/shards/{name}-*.tar")), shardshuffle=False):
    photo, record = sample["jpg"], json.loads(sample["json"])
```

```python
from datasets import load_dataset

data = load_dataset("webdataset", data_files="{name}/shards/{name}-*.tar", split="train", streaming=True)
```
"""
    layout = f"""`shard` in the index is a path relative to this folder.
{splits}
To publish the corpus, publish this file (`README.md`) and the files of the table. The folder of a build has
other files, which ParaCaption needs to continue the build (`build`) and to look into it (`explore`, `report`,
`versions` and other commands). Do not publish those: they may contain paths and process names of the machine
that built the corpus, and names of reviewers.
"""
    return examples, layout


def _in_bucket(name: str, out: str, splits: str) -> tuple[str, str]:
    """The same of one in a bucket, where the commit log says which names count, and no pattern does."""
    scheme = out.partition("://")[0]
    examples = f"""```python
import json
import paracaption
import webdataset as wds
from paracaption.pipeline.corpus.shard_pipes import pipe_of

shards = paracaption.list_shards("{scheme}://BUCKET/CORPUS", "{name}")  # where this file lies
for sample in wds.WebDataset([pipe_of(shard) for shard in shards], shardshuffle=False):
    photo, record = sample["jpg"], json.loads(sample["json"])
```

```python
from datasets import load_dataset

data = load_dataset("webdataset", data_files=shards, split="train")  # fetches the shards first
```

`pipe_of` makes `pipe:{PIPES.get(scheme, "...")}` of a URL: webdataset reads what this command prints.
`paracaption inspect {scheme}://BUCKET/CORPUS --shards` prints the same list, one URL in a line, for programs
that are not in Python, and with `--pipe` as webdataset's commands. `datasets` reads URLs through fsspec,
which takes the store's credentials from the environment. How it streams from S3 is in ParaCaption's
documentation (docs/buckets.md).
"""
    layout = f"""Here each of these files has another ending (`<unit>-1f0c66ab52d3.tar`), and those of earlier
versions may lie next to it. The commit log (`log/`) says which ones count, and ParaCaption looks there, so do
not name files by a pattern. `paracaption.open_corpus(URL).shard_path(row)` is the URL of the shard that a row
of the index names.
{splits}
To publish the corpus, export it as a dataset repository (`paracaption export --format hub`).
"""
    return examples, layout


def configuration(config: BuildConfig, summary: CorpusSummary) -> str:
    values = {**published(config.model_dump(mode="json")), "out": "."}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    rows = [
        (subset_title(name), ", ".join(subset.counts.plans), ", ".join(subset.counts.recipes))
        for name, subset in summary.subsets.items()
    ]
    return (
        "## Configuration\n\nPaths are shortened to their last part.\n\nSHA-256 of the configuration as "
        f"printed below: `{digest}`\n\nThe digests identify the work list (which images are in which unit) "
        "and the recipe (the steps above with their settings) that the units of a subset were built with. "
        "A subset should have one of each.\n\n"
        + table(("subset", "digest of the work list", "digest of the recipe"), rows)
        + f"\n```yaml\n{text}```\n"
    )


def table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    numeric = [all(isinstance(row[i], int) for row in rows) and bool(rows) for i in range(len(header))]
    lines = [header, tuple("---:" if right else "---" for right in numeric)]
    lines += [tuple(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def count_of(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def plain(text: str) -> str:
    """Names come from models and strangers: nothing in them is Markdown or HTML."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)
