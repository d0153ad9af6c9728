"""`README.md` and `LICENSE.md` of a dataset repository, from the plan, the statistics and the config."""

from __future__ import annotations

import re
from typing import Any

import yaml
from msgspec import inspect

from ...schemas.config import BuildConfig
from ...schemas.sample import PHOTO_ENDING, Sample
from ...schemas.summary import CorpusSummary, SubsetSummary
from ..sources.registry import subset_title
from . import card
from .hub_plan import INDEX, HubPlan, Shard

LICENSE_FILE = "LICENSE.md"

_ALL = "all"
"""The configuration that has every subset, if there are several."""

_CC = re.compile(
    r"creativecommons\.org/licenses/(?P<kind>by[a-z-]*)/(?P<version>\d\.\d)|"
    r"\bcc[ -](?P<name>by(?:-(?:nc|sa|nd))*)[ -](?P<number>\d\.\d)(?:\s*\(.*\))?$"
)
_CC0 = re.compile(r"creativecommons\.org/publicdomain/zero/1\.0|^cc0(?:[ -]1\.0)?$")
_KNOWN = frozenset(
    {
        *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
        *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("apache-2.0", "mit", "odc-by", "odbl", "pddl", "cdla-permissive-1.0", "cdla-permissive-2.0"),
    }
)
"""Licenses that the hub has an identifier for, of those that data sets come under."""


def front_matter(plan: HubPlan, summary: CorpusSummary, config: BuildConfig) -> dict[str, Any]:
    """What the hub and `datasets` read at the head of the card.

    All configurations are of shards: `datasets` reads a repository with the reader of its first one, so the
    index, which is Parquet, cannot be one of them.
    """
    return {
        "pretty_name": card.TITLE,
        **license_fields(find_licenses(plan, summary, config)),
        **card.SUBJECT,
        "size_categories": [card.size_category(plan.images)],
        "configs": [_config(plan, name, subset) for name, subset in _configs(plan).items()],
        "dataset_info": [_info(plan, name, subset) for name, subset in _configs(plan).items()],
    }


def _configs(plan: HubPlan) -> dict[str, str | None]:
    """The configurations by name, with their subset; None is every subset. The first is the default."""
    subsets = {name: name for name in plan.subsets}
    if len(subsets) == 1:
        return dict(subsets)
    whole = _ALL
    while whole in subsets:
        whole += "_"
    return {whole: None, **subsets}


def _config(plan: HubPlan, name: str, subset: str | None) -> dict[str, Any]:
    splits = dict.fromkeys(shard.split for shard in plan.of(subset))
    files = [{"split": split, "path": f"data/{subset or '*'}/{split}-*.tar"} for split in splits]
    default = {"default": True} if name == next(iter(_configs(plan))) else {}
    return {"config_name": name, **default, "data_files": files}


def _info(plan: HubPlan, name: str, subset: str | None) -> dict[str, Any]:
    splits: dict[str, list[Shard]] = {}
    for shard in plan.of(subset):
        splits.setdefault(shard.split, []).append(shard)
    listed = [
        {
            "name": split,
            "num_bytes": sum(shard.content for shard in shards),
            "num_examples": sum(shard.images for shard in shards),
        }
        for split, shards in splits.items()
    ]
    return {
        "config_name": name,
        "features": features(),
        "splits": listed,
        "download_size": sum(shard.bytes for shard in plan.of(subset)),
        "dataset_size": sum(each["num_bytes"] for each in listed),
    }


def features() -> list[dict[str, Any]]:
    """The columns of a shard's samples in the words of `datasets`.

    Without them `datasets` takes the fields of the first five samples for those of all, and silently
    leaves out what a later one has more, such as `exif_orientation`.
    """
    record = _feature("json", inspect.type_info(Sample))
    texts = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    return [{"name": PHOTO_ENDING, "dtype": "image"}, record, *texts]


def _feature(name: str, kind: inspect.Type) -> dict[str, Any]:
    if isinstance(kind, inspect.UnionType):  # of something and None
        [kind] = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
    if isinstance(kind, inspect.StructType):
        return {"name": name, "struct": [_feature(each.encode_name, each.type) for each in kind.fields]}
    if isinstance(kind, inspect.ListType | inspect.TupleType):
        inner = _feature("", kind.item_type if isinstance(kind, inspect.ListType) else kind.item_types[0])
        return {"name": name, "list": inner.get("struct") or inner["dtype"]}
    return {"name": name, "dtype": "int64" if isinstance(kind, inspect.IntType) else "string"}


def find_licenses(plan: HubPlan, summary: CorpusSummary, config: BuildConfig) -> set[str]:
    """The licenses of the photos, each as the hub's identifier if it has one, else as it is written.

    If every image of a subset states its license, what the configuration says of the source does not count.
    """
    found: set[str] = set()
    for subset in plan.subsets:
        known: SubsetSummary | None = summary.subsets.get(subset)
        stated = known.licenses if known else []
        listed = [each for each in stated if each.license]
        names = ((each.license_url, each.license) for each in listed)
        found |= {_identifier(url) or _identifier(name) or name for url, name in names}
        if known and known.num_licenses > len(listed):
            found.add("further licenses")
        if len(listed) < len(stated) or not stated:
            sources = card.sources_of(config, subset) if subset in config.subsets else [("", "unknown")]
            found |= {_identifier(license) or license or "unknown" for _, license in sources}
    return found


def _identifier(text: str) -> str:
    """The hub's identifier of a license that is named or linked to; "" if it has none."""
    text = " ".join(text.split()).lower()
    if _CC0.search(text):
        return "cc0-1.0"
    if found := _CC.search(text):
        text = f"cc-{found['kind'] or found['name']}-{found['version'] or found['number']}"
    return text if text in _KNOWN else ""


def license_fields(licenses: set[str]) -> dict[str, str]:
    """The license in the front matter: `other`, and a file, where the hub has no single identifier."""
    [first, *others] = sorted(licenses)
    if not others and first in _KNOWN:
        return {"license": first}
    named = re.sub(r"[^a-z0-9.]+", "-", first.lower()).strip("-") if not others else ""
    return {"license": "other", "license_name": named or card.PER_SOURCE, "license_link": LICENSE_FILE}


def render_license(summary: CorpusSummary, config: BuildConfig) -> str:
    """`LICENSE.md`: whose licenses apply to what."""
    return (
        "# Licenses\n\nPhotos and masks stay under the licenses of their publishers, which are listed below. "
        "Captions were generated by the models that `README.md` names under *Configuration*; the terms of "
        "those models apply to them. Whoever passes photos on has to keep the credits that are stated for "
        "them.\n\n" + card.license_tables(config, summary, _INDEX_FILES)
    )


_INDEX_FILES = f"{INDEX}/*.parquet"


def render_card(plan: HubPlan, summary: CorpusSummary, config: BuildConfig, energon: bool = False) -> str:
    """`README.md`. Equal corpora give an equal card."""
    values = yaml.safe_dump(front_matter(plan, summary, config), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{values}---\n",
        _head(plan),
        _build(plan, summary),
        card.steps(summary, config),
        f"## Licenses\n\nSee [{LICENSE_FILE}]({LICENSE_FILE}).\n",
        _reading(plan),
        _ENERGON if energon else "",
        card.configuration(config, summary),
    ]
    return "\n".join(filter(None, parts))


def _head(plan: HubPlan) -> str:
    rows = []
    for subset in plan.subsets:
        for split in plan.splits:
            if shards := plan.of(subset, split):
                sums = [sum(getattr(each, name) for each in shards) for name in ("images", "regions")]
                rows.append((subset, split, *sums, len(shards), f"{sum(s.bytes for s in shards) / 1e6:,.1f}"))
    header = ("subset", "split", "images", "regions", "shards", "MB")
    held = ""
    if "validation" in plan.splits:
        held = " Images of `validation` were held out: do not train on them."
    counted = f"{card.count_of(plan.regions, 'region')} of {card.count_of(plan.images, 'image')}"
    text = f"{counted}, each with its mask and a checked caption. Made with ParaCaption.{held}"
    return f"# {card.TITLE}\n\n{text}\n\n{card.table(header, rows)}"


def _build(plan: HubPlan, summary: CorpusSummary) -> str:
    """The funnel of each subset, which is of both splits."""
    text = ["## What was dropped\n\nHow many regions each step dropped, and why, over all splits.\n"]
    known = {subset: summary.subsets[subset] for subset in plan.subsets if subset in summary.subsets}
    text += [f"### {subset_title(subset)}\n\n{card.funnel(each.counts)}" for subset, each in known.items()]
    return "\n".join(text)


def _reading(plan: HubPlan) -> str:
    name, split = next(iter(_configs(plan))), plan.splits[0]
    subset = next(each for each in plan.subsets if plan.of(each, split))
    named = "" if len(_configs(plan)) == 1 else f'"{subset}", '
    return f"""## Reading it

`<key>.jpg` is the photo. Its name always ends in `.jpg`; `photo_format` says which format it has.
`<key>.json` has the regions with `rle` (COCO's compressed RLE), `bbox` (x, y, width, height), `area`,
`category` (which the source annotates), `core_category` (which the judge named from the caption, if it was
asked) and `caption`. Masks fit the pixels as stored, so do not rotate a photo.

```python
from datasets import load_dataset

data = load_dataset("REPOSITORY", {named}split="{split}", streaming=True)  # the default is `{name}`
row = next(iter(data))
row["jpg"], row["json"]["regions"][0]["caption"]  # a PIL image, a text
```

A field that a JSON does not have is null there; `exif_orientation` is null if it is 1.

```python
import glob, json
import webdataset as wds

shards = sorted(glob.glob("data/{subset}/{split}-*.tar"))
for sample in wds.WebDataset(shards, shardshuffle=False):
    photo, record = sample["jpg"], json.loads(sample["json"])
```

```python
from pycocotools import mask

pixels = mask.decode(record["regions"][0]["rle"])  # (height, width) of 0 and 1, for the photo as stored
```

`{INDEX}/<split>.parquet` has a row per region: caption, category, box, scores, license and origin of the
photo, and the place of its sample (`shard` is a path from this folder; offsets and lengths are in bytes).
Read it with `load_dataset("parquet", data_files="{INDEX}/{split}.parquet")`, DuckDB or pyarrow.
"""


_ENERGON = """## Megatron-Energon

Each folder `data/<subset>` is a dataset that Megatron-Energon opens as it is. `energon.yaml` blends them.
"""
