import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from paracaption.pipeline.config_file import (
    describe,
    load_config,
    load_evaluation,
    load_judge,
    load_training,
)
from paracaption.pipeline.models import registry
from paracaption.pipeline.sources.protocols import Catalog
from paracaption.pipeline.sources.registry import SOURCES, find_options, open_source, recipe_name
from paracaption.schemas.config import Backend, BuildConfig, dump_config
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.evaluation import EvaluateConfig
from paracaption.schemas.training import TrainConfig

COCONUT = {"annotations": ["in/*.json"], "labels": "in/labels", "photos": ["in/a", "s3://bucket/b"]}


def write(folder, **values):
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump({"out": "out", "sa1b": [{"paths": ["in/sa_*.tar"]}], **values}))
    return path


def test_what_is_dumped_is_read_back_equal(tmp_path):
    config = load_config(write(tmp_path, coconut=[COCONUT], min_iou=0.25, io={"concurrency": [2, 3]}))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    later = ("held_out_share", "mask_generator")  # of early configurations neither is written
    early = [name for name in BuildConfig.model_fields if name not in later]
    assert list(yaml.safe_load(dump_config(config))) == early
    own = {"held_out_share": 0.1, "mask_generator": Backend(name="sam")}
    assert list(yaml.safe_load(dump_config(config.model_copy(update=own)))) == list(BuildConfig.model_fields)


def test_relative_paths_are_seen_from_the_file_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load_config(write(tmp_path, coconut=[COCONUT]))
    root = tmp_path.resolve()
    assert config.out == f"{root}/out"
    assert config.subsets["sa1b"].sources[0]["paths"] == [f"{root}/in/sa_*.tar"]
    source = config.subsets["coconut"].sources[0]
    assert (source["annotations"], source["labels"]) == ([f"{root}/in/*.json"], f"{root}/in/labels")
    assert source["photos"] == [f"{root}/in/a", "s3://bucket/b"]
    assert source["categories"] is None


def test_relative_paths_of_training_and_evaluation_are_seen_from_the_file_too(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    root = tmp_path.resolve()
    benches = [{"name": "b", "kind": "dlc", "folder": "bench", "photos": "photos"}]
    evaluation = {
        "out": "out",
        "label": "l",
        "captioner": {"name": "perceptiondlm", "options": {"model": "model"}},
        "judge": {"name": "vllm", "options": {"model": "judge"}},
        "benchmarks": [*benches, {**benches[0], "name": "c", "photos": "s3://bucket/photos"}],
        "toy": "toy",
        "profile": {"corpus": "corpus"},
    }
    (tmp_path / "evaluate.yaml").write_text(json.dumps(evaluation))
    read = load_evaluation(tmp_path / "evaluate.yaml")
    assert (read.out, read.toy) == (f"{root}/out", f"{root}/toy")
    assert read.profile is not None and read.profile.corpus == f"{root}/corpus"
    assert [each.folder for each in read.benchmarks] == [f"{root}/bench"] * 2
    assert [each.photos for each in read.benchmarks] == [f"{root}/photos", "s3://bucket/photos"]
    assert read.captioner.options["model"] == f"{root}/model"
    assert read.judge is not None and read.judge.options["model"] == f"{root}/judge"

    training = {
        "out": "run",
        "model": {"path": "model"},
        "steps": 1,
        "corpora": [{"corpus": "corpus"}, {"corpus": "s3://bucket/corpus"}],
        "conversations": [{"path": "a.json", "images": "photos"}],
        "data": {"cache": "cache"},
        "evaluation": {"corpus": "held"},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(training))
    trained = load_training(tmp_path / "train.yaml")
    assert (trained.out, trained.model.path) == (f"{root}/run", f"{root}/model")
    assert [each.corpus for each in trained.corpora] == [f"{root}/corpus", "s3://bucket/corpus"]
    (talk,) = trained.conversations
    assert (talk.path, talk.images) == (f"{root}/a.json", f"{root}/photos")
    assert trained.data.cache == f"{root}/cache"
    assert trained.evaluation is not None and trained.evaluation.corpus == f"{root}/held"


def test_absolute_paths_are_taken_as_they_are_and_home_stays_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write(tmp_path, out="/data/out", sa1b=[{"paths": ["~/sa", "file:///mnt/sa"]}]))
    assert config.out == "/data/out"
    assert config.subsets["sa1b"].sources[0]["paths"] == ["${HOME}/sa", "/mnt/sa"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"min_iuo": 0.5},
            r"build.yaml: min_iuo: unknown key; did you mean `min_iou`\? see",
        ),
        ({"masks": {"min_area": 3}}, r"build.yaml: masks.min_area: unknown key"),
        (
            {"min_verdict_margin": float("inf")},
            r"min_verdict_margin: has to be a finite number \(given: inf\)",
        ),
        ({"min_verdict_margin": "inf"}, r"min_verdict_margin: has to be a finite number \(given: 'inf'\)"),
        ({"min_iou": float("nan")}, r"min_iou: has to be a finite number"),
        (
            {"captioner": {"name": "gar", "options": {"a": [1, float("-inf")]}}},
            r"captioner.options.a.1: has to be a finite number \(given: -inf\)",
        ),
        (
            {"subsets": {"a": {"sources": {"source": "coco", "annotations": ["a.json"], "photos": []}}}},
            r"photos: has to have at least one entry",
        ),
        ({"masks.min_area_px": 3}, r"unknown key; did you mean `masks: \{min_area_px: \.\.\.\}`\? see"),
        ({"min_area_px": 3}, r"unknown key; did you mean `masks: \{min_area_px: \.\.\.\}`\? see"),
        (
            {"sa1b": [{"paths": ["a"], "licens": "x"}]},
            r"sa1b.0.licens: unknown option; `sa1b` takes license, paths",
        ),
        ({"min_iou": 2}, r"min_iou: .*less than or equal to 1 \(given: 2\)"),
        ({"sa1b": [{}]}, r"sa1b.0.paths: is missing; add it$"),
        ({"sa1b": []}, r".*name at least one source"),
        ({"captioner": {"name": "x", "concurrency": [3, 2]}}, r"captioner: .*1 <= min <= max, not \(3, 2\)"),
        (
            {"coconut": [{"annotations": ["a"], "photos": ["b"]}]},
            r"needs `labels`, the folder of the label PNGs",
        ),
        ({"out": "ftp://host/out"}, r"out: ftp://host/out: a corpus cannot be written to ftp://; give a"),
        ({"out": "s3:///out"}, r"out: s3:///out: names no bucket; write s3://BUCKET/CORPUS"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(write(tmp_path, **changes))
    assert len(str(caught.value).splitlines()) == 1


SHORT = {"coconut": [COCONUT, COCONUT], "sa1b": [{"paths": ["in/sa_*.tar"]}]}
LONG = {
    "coconut": {"sources": [{"source": "coconut", **COCONUT}, {"source": "coconut", **COCONUT}]},
    "sa1b": {"sources": {"source": "sa1b", "paths": ["in/sa_*.tar"]}},
}


def read_values(folder, **values):
    """The configuration of a file with these values alone."""
    (folder / "build.yaml").write_text(yaml.safe_dump({"out": "out", **values}, sort_keys=False))
    return load_config(folder / "build.yaml")


def test_the_old_keys_are_short_for_subsets_of_their_name(tmp_path):
    short = read_values(tmp_path, **SHORT)
    assert short == read_values(tmp_path, subsets=LONG)
    assert short == read_values(tmp_path, coconut=SHORT["coconut"], subsets={"sa1b": LONG["sa1b"]})
    assert list(short.subsets) == ["coconut", "sa1b"]
    assert list(read_values(tmp_path, sa1b=SHORT["sa1b"], coconut=COCONUT).subsets) == ["coconut", "sa1b"]


def test_subsets_have_names_and_sources_of_ones_own_choice_and_are_built_in_their_order(tmp_path):
    sources = LONG["coconut"]["sources"]
    config = read_values(
        tmp_path,
        subsets={
            "train-2": {"sources": sources[0]},
            "all.masks": {"sources": [LONG["sa1b"]["sources"]]},
            "coconut": {"sources": sources, "recipe": "identify"},
        },
    )
    assert list(config.subsets) == ["train-2", "all.masks", "coconut"]
    assert [recipe_name(config, name) for name in config.subsets] == ["verify", "identify", "identify"]
    assert len(open_source(config, "coconut").sources) == 2


def test_a_recipe_is_a_known_one_and_kinds_with_different_recipes_need_one_that_is_named(tmp_path):
    mixed = [*LONG["coconut"]["sources"], LONG["sa1b"]["sources"]]
    with pytest.raises(ConfigError, match=r"yaml: subsets.mixed.recipe: its sources have the recipes"):
        read_values(tmp_path, subsets={"mixed": {"sources": mixed}})
    config = read_values(tmp_path, subsets={"mixed": {"sources": mixed, "recipe": "identify"}})
    assert recipe_name(config, "mixed") == "identify"
    with pytest.raises(ConfigError, match=r"yaml: subsets.mixed.recipe: unknown recipe 'guess'; choose from"):
        read_values(tmp_path, subsets={"mixed": {"sources": mixed, "recipe": "guess"}})


SA1B = {"source": "sa1b", "paths": ["in/sa_*.tar"]}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            {"source": "lvis"},
            r"subsets.a.sources.0.source: unknown kind of source 'lvis'; choose from coconut, sa1b",
        ),
        (SA1B | {"path": "y"}, r"sources.0.path: unknown option; `sa1b` takes license, paths \(given: 'y'\)"),
        (SA1B | {"paths": 3}, r"subsets.a.sources.0.paths: has to be a list \(given: 3\)"),
        (
            {"source": "coconut", "annotations": ["a"], "photos": ["b"]},
            r"subsets.a.sources.0: .*needs `labels`",
        ),
    ],
)
def test_a_mistake_in_a_source_is_the_same_line_from_a_file_and_from_a_program(tmp_path, source, told):
    subsets = {"a": {"sources": source}}
    with pytest.raises(ConfigError, match=told) as from_file:
        read_values(tmp_path, subsets=subsets)
    with pytest.raises(ConfigError) as from_program:
        open_source(BuildConfig.model_validate({"out": "out", "subsets": subsets}), "a")
    assert str(from_file.value) == f"{tmp_path}/build.yaml: {from_program.value}"
    assert len(str(from_program.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("subsets", "told"),
    [
        ({"a": {"sources": {"paths": ["x"]}}}, r"subsets.a.sources.0.source: name the kind"),
        ({"a": {"sources": []}}, r"subsets.a.sources: has to have at least one entry"),
        ({"a": {"sources": SA1B, "recipes": "x"}}, r"subsets.a.recipes: unknown key"),
        ({"a/b": {"sources": SA1B}}, r"subsets.a/b.*a subset is a folder"),
        ({"..": {"sources": SA1B}}, r"a subset is a folder"),
        ({"plots": {"sources": SA1B}}, r"a subset is a folder.*not .*plots"),
        ({"log": {"sources": SA1B}}, r"a subset is a folder.*not .*log"),
        ({"beat": {"sources": SA1B}}, r"a subset is a folder.*not .*beat"),
        ({"corpus.json": {"sources": SA1B}}, r"a subset is a folder.*not .*corpus.json"),
        ({}, r".*name at least one source under `subsets`"),
    ],
)
def test_a_mistake_in_a_subset_is_one_line(tmp_path, subsets, told):
    with pytest.raises(ConfigError, match=told) as caught:
        read_values(tmp_path, subsets=subsets)
    assert len(str(caught.value).splitlines()) == 1


def test_a_subset_that_is_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`sa1b` is given twice; keep the one under `subsets`"):
        read_values(tmp_path, sa1b=SHORT["sa1b"], subsets=LONG)


def test_every_mistake_has_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, min_iuo=0.5, min_iou=-1, sa1b=[{"paths": 1, "path": 2, "photos": 3}]))
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"out: [", "not a YAML file"),
        (b"\xff\xfe\xfa", "not a YAML file"),
        ("out: a".encode("utf-16"), "not a YAML file: UTF-16; save it as UTF-8"),
        ("out: café".encode("latin-1"), "not a YAML file: save it as UTF-8"),
        (b"out: a\n\tsa1b: b", "not a YAML file: .* '.t' that cannot start any token line 2, column 1"),
        (b"out: a\nsa1b: []\nout: b", "not a YAML file: `out` is given twice; keep one line 3"),
        (b"out: a\nmasks: {min_area: 1, min_area: 2}", "not a YAML file: `min_area` is given twice"),
        (b"- out", ".* but it is a list"),
        (b"hello", ".* but it is a single value"),
        (b"", "the file is empty"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, content, told):
    (tmp_path / "build.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"build.yaml: {told}") as caught:
        load_config(tmp_path / "build.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).count("save it as UTF-8") < 2 and "UTF-8; correct" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfout: a\nsa1b: [{paths: [x]}]",
        b"out: a\r\nsa1b: [{paths: [x]}]\r\n",
        b'{"out": "a", "sa1b": [{"paths": ["x"]}]}',
        b"out: a\nsa1b: [{<<: &given {paths: [y]}, paths: [x]}]",
        b"out: a\nsa1b: [{paths: [x/]}]\ntext: {<<: {min_words: 3}, <<: {max_words: 9}}",
    ],
)
def test_yaml_that_is_written_in_another_way_is_the_same(tmp_path, content):
    (tmp_path / "build.yaml").write_bytes(content)
    config = load_config(tmp_path / "build.yaml")
    assert config.subsets["sa1b"].sources[0]["paths"] == [str(tmp_path.resolve() / "x")]


def test_no_file_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")


def test_the_configuration_cannot_be_changed_after_it_is_read(tmp_path):
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.min_iou = 0.1


def keys_of(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.default, BaseModel):
            found |= keys_of(type(field.default))
    return found


def test_describe_names_every_key_once_a_level_and_parses_as_yaml():
    described = re.findall(r"^[# -]*(\w+):", describe(), flags=re.MULTILINE)
    wanted = (
        keys_of(BuildConfig)
        | keys_of(Backend)
        | {name for kind in SOURCES for name in find_options(kind).model_fields}
    )
    assert wanted <= set(described)
    assert list(yaml.safe_load(describe())) == list(BuildConfig.model_fields)


def test_describe_names_every_backend_and_its_page():
    text = describe()
    for protocol, known in registry.BACKENDS.items():
        [line] = re.findall(rf"^#   {protocol}: (.*)", text, re.MULTILINE)
        assert line.split(", ") == [f"{name} ({each.page})" for name, each in known.items()]
        for name, each in known.items():
            assert f"`{name}`" in (Path(__file__).resolve().parents[2] / each.page).read_text(), name


def pruned(values, kind):
    """Values of a described configuration without those that have to be given."""
    found = {}
    for name, value in values.items():
        nested = getattr(kind.model_fields[name], "annotation", None)
        if isinstance(nested, type) and issubclass(nested, BaseModel) and isinstance(value, dict):
            value = pruned(value, nested)
        if value != "required":
            found[name] = value
    return found


@pytest.mark.parametrize("kind", [BuildConfig, TrainConfig, EvaluateConfig])
def test_a_described_value_is_the_default_and_a_section_that_is_null_has_its_keys_in_comments(kind):
    text = describe(kind)
    for name, value in pruned(yaml.safe_load(text), kind).items():
        field = kind.model_fields[name]
        if field.is_required():
            continue
        default = field.get_default(call_default_factory=True)
        default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
        default = list(default) if isinstance(default, tuple) else default
        if name in registry.BACKENDS and default is not None:
            default = {"name": default["name"]}
        assert value == default, name
    if kind is not BuildConfig:
        on = re.sub(r"^(\w+): (null|\[\])(  # .*\n)(?=#)", r"\1:\3", text, flags=re.MULTILINE)
        values = yaml.safe_load(re.sub(r"^#(?=  )", "", on, flags=re.MULTILINE))
        section = {TrainConfig: "evaluation", EvaluateConfig: "profile"}[kind]
        listed = {TrainConfig: "corpora", EvaluateConfig: "benchmarks"}[kind]
        assert values[section]["corpus"] == "required" and len(values[listed]) == 1


@pytest.mark.parametrize("kind", [BuildConfig, TrainConfig, EvaluateConfig])
def test_a_key_that_takes_few_values_names_each(kind):
    text = describe(kind)
    layouts = ("layout: panoptic", "parquet"), ("layout: files", "files indexed")
    for start, values in (("compile:", "always never auto"), ("kind:", "paradlc dlc"), *layouts):
        for line in re.findall(rf"^[# -]*{start} .*", text, re.MULTILINE):
            assert all(f"`{value}`" in line for value in values.split()), line


def test_every_key_with_a_number_says_why():
    for line in describe().splitlines():
        if re.search(r": [\d.]+\b", line.partition("#")[0]):
            assert "# " in line, line


def test_the_recipe_for_gpus_names_backends_and_keys_that_exist():
    config = load_config(Path(__file__).resolve().parents[2] / "configs/gpu.yaml")
    names = {part: getattr(config, part).name for part in registry.BACKENDS}
    assert names == {
        "captioner": "gar",
        "judge": "vllm",
        "segmenter": "sam3",
        "mask_generator": "color_regions",
    }
    for part in names:
        assert registry.find_backend(part, getattr(config, part))


def test_a_configuration_without_a_mask_generator_is_written_as_before_there_were_any(tmp_path):
    values = {"out": str(tmp_path), "sa1b": [{"paths": ["x.tar"]}]}
    plain = BuildConfig.model_validate(values)
    assert "mask_generator" not in dump_config(plain)
    other = BuildConfig.model_validate(
        values | {"mask_generator": {"name": "sam", "options": {"model": "m"}}}
    )
    read = yaml.safe_load(dump_config(other))
    assert read["mask_generator"]["name"] == "sam"
    assert BuildConfig.model_validate(read) == other
    default = {"mask_generator": {"name": "color_regions"}}
    assert dump_config(BuildConfig.model_validate(values | default)) == dump_config(plain)


def test_keys_that_do_not_fit_together_are_told_without_printing_the_whole_file(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        yaml.safe_dump({"out": "run", "model": {"path": "m"}, "steps": 1, "log": {"wandb": "secret"}})
    )
    with pytest.raises(ConfigError, match="name something to train on") as told:
        load_training(path)
    assert "secret" not in str(told.value) and "given" not in str(told.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "out: " + "9" * 5_000,
        "out: 2020-99-99",
        "out: !!timestamp soon",
        "out: !!float soon",
        "out: !!python/object:os.system {}",
        'out: "a\\0b"',
        "out: ~nobody.of.this.name/x",
    ],
    ids=["deep", "digits", "date", "timestamp", "float", "python", "nul", "home"],
)
def test_a_file_of_which_yaml_makes_nothing_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "build.yaml"
    path.write_text(f"{text}\nsa1b: [{{paths: [in]}}]\n")
    with pytest.raises(ConfigError, match=r"build\.yaml: [^\n]+$") as told:
        load_config(path)
    assert len(str(told.value)) < 400 and "object has no attribute" not in str(told.value)


@pytest.mark.parametrize("given", ['"a\\0b"', '"\\ud800"', "~nobody.of.this.name/x"])
def test_an_option_that_is_no_path_is_named(tmp_path, given):
    path = tmp_path / "judge.yaml"
    path.write_text(f"name: vllm\noptions: {{model: {given}}}\n")
    with pytest.raises(ConfigError, match=r"judge\.yaml: options\.model: not a valid path"):
        load_judge(path)


@pytest.mark.parametrize("given", [5, [1], {"a": 1}, None, True, ""])
def test_an_option_that_is_no_text_is_left_to_who_reads_the_options(tmp_path, given):
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump({"name": "vllm", "options": {"model": given}}))
    assert load_judge(path).options == {"model": given}


def test_relative_paths_of_a_configuration_in_a_folder_with_brackets_are_names(tmp_path):
    home = tmp_path / "proj [2024]"
    home.mkdir()
    (home / "sa_1.tar").write_bytes(b"")
    (home / "c.yaml").write_text("out: ./out\nsa1b: [{paths: [sa_1.tar]}]\n")
    config = load_config(home / "c.yaml")
    source = open_source(config, "sa1b").sources[0]
    assert list(source.fingerprint(Catalog())) == [str(home / "sa_1.tar")]


def test_a_configuration_that_is_a_folder_a_device_or_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path, told in (
        (tmp_path, "is a folder; give the YAML file in it"),
        (tmp_path / "loop.yaml", "cannot be read"),
        (Path("/dev/zero"), "longer than"),
        (Path("a\0b.yaml"), "no file can have this name"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["loop/x", "a\0b", "\ud800"])
def test_a_path_that_cannot_be_one_is_a_line_that_names_its_key(tmp_path, path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "c.yaml").write_text(json.dumps({"out": "./out", "sa1b": [{"paths": [path]}]}))
    with pytest.raises(ConfigError, match=r"sa1b\.0\.paths\.0") as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
