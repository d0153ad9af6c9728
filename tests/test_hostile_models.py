"""A model's folder is a stranger's: whatever it names, no loader of ours runs a line of its code.

Each folder works until something hostile is put in. A loader may then load it without the code, or refuse it
in one line; the planted code leaves a file where it runs. Questions on the terminal are answered with yes.
"""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paracaption.schemas.errors import ParaCaptionError
from paracaption.schemas.training import Model
from tests.pipeline.models.gar_parts import TILE_PX
from tests.tiny import perceptiondlm as parts
from tests.tiny.gar import write_gar
from tests.tiny.perceptiondlm_model import write_model
from tests.tiny.qwen3 import write_qwen3
from tests.tiny.sam import write_sam, write_sam3

pytestmark = pytest.mark.timeout(300)

AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskGeneration", "AutoTokenizer")
AUTO += ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
CONFIGS += ("generation_config.json", "video_preprocessor_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A working folder for each loader."""
    from paracaption.model_training.convert.published import from_parts

    root = tmp_path_factory.mktemp("models")
    llada, siglip = parts.write_llada(root / "llada"), parts.write_siglip(root / "siglip")
    from_parts(llada, siglip, root / "joined")
    return {
        "perceptiondlm": write_model(root / "perceptiondlm"),
        "joined": root / "joined",
        "llada": llada,
        "siglip": siglip,
        "gar": write_gar(root / "GAR", "1b", tile_px=TILE_PX),
        "qwen3": write_qwen3(root / "qwen3"),
        "sam3": write_sam3(root / "sam3"),
    }


def _caption(model: Path, **_: Path) -> None:
    from paracaption.model_training.decoding.region_captioner import RegionCaptioner

    RegionCaptioner.load(model, device="cpu")


def _processor(model: Path, **_: Path) -> None:
    from paracaption.model_training.model.processor import PerceptionDLMProcessor

    PerceptionDLMProcessor.from_pretrained(model, trust_remote_code=True)  # whatever a caller asks of it


def _evaluate(model: Path, **_: Path) -> None:
    from paracaption.model_training.evaluation import captioners
    from paracaption.schemas.config import Backend

    given = captioners.model_options(
        Backend(name="perceptiondlm", options={"model": str(model), "device": "cpu"})
    )
    captioners.identity(Backend(name="perceptiondlm", options={"model": str(model)}))
    given.load_model()


def _train(model: Path, **_: Path) -> None:
    from paracaption.model_training.train import build

    build._load_saved_model(Model(path=str(model)), "sdpa")


def _new_model(model: Path, **_: Path) -> None:
    from paracaption.model_training.train import build

    build._load_tokenizer(str(model))


def _to_published(model: Path, to: Path, siglip: Path) -> None:
    from paracaption.model_training.convert.published import convert

    convert(model, to, vision=siglip)


def _from_language(model: Path, to: Path, siglip: Path) -> None:
    from paracaption.model_training.convert.published import from_parts

    from_parts(model, siglip, to)


def _from_vision(model: Path, to: Path, llada: Path) -> None:
    from paracaption.model_training.convert.published import from_parts

    from_parts(llada, model, to)


def _gar(model: Path, to: Path) -> None:
    from paracaption.pipeline.models.gar import checkpoint, export
    from paracaption.pipeline.models.gar.captioner import GarCaptioner
    from paracaption.pipeline.models.gar.prompt import Prompts

    GarCaptioner.check(model=str(model))
    GarCaptioner.identity(model=str(model))
    Prompts(checkpoint.read_config(model))
    export.prepare(model, to)


def _judge(model: Path, **_: Path) -> None:
    from paracaption.pipeline.models.vllm_judge import VllmJudge

    VllmJudge.identity(model=str(model))
    VllmJudge.check(model=str(model))


def _sam3(model: Path, **_: Path) -> None:
    from paracaption.pipeline.models.sam3 import Sam3Segmenter

    Sam3Segmenter.check(model=str(model))
    Sam3Segmenter(model=str(model), device="cpu")


LOADERS: dict[str, tuple[str, Callable[..., None]]] = {
    "caption": ("perceptiondlm", _caption),
    "processor": ("perceptiondlm", _processor),
    "evaluate": ("perceptiondlm", _evaluate),
    "train": ("perceptiondlm", _train),
    "train, new model": ("perceptiondlm", _new_model),
    "convert": ("joined", _to_published),
    "convert --language": ("llada", _from_language),
    "convert --vision": ("siglip", _from_vision),
    "gar": ("gar", _gar),
    "judge": ("qwen3", _judge),
    "sam3": ("sam3", _sam3),
}


class _Runs:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def _name_code(folder: Path, mark: Path, class_names: bool) -> None:
    """Let every config of the folder name Python code in it, that of a class or of a function."""
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        + "".join(f"class Evil{name}:\n    pass\n" for name in AUTO)
        + "def generate(*_, **__):\n    pass\n"
    )
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    auto = {name: f"evil.Evil{name}" for name in AUTO} | {"AutoTokenizer": ["evil.EvilAutoTokenizer"] * 2}
    for name in CONFIGS:
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        values["auto_map"] = auto
        if class_names:
            kinds = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
            values |= {kind: f"Evil{kind}" for kind in kinds}
        path.write_text(json.dumps(values))


def _plant_classes(folder: Path, mark: Path) -> None:
    _name_code(folder, mark, class_names=True)


def _plant_maps(folder: Path, mark: Path) -> None:
    _name_code(folder, mark, class_names=False)


def _plant_unknown_model(folder: Path, mark: Path) -> None:
    _name_code(folder, mark, class_names=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))


def _plant_pickle_beside(folder: Path, mark: Path) -> None:
    data = pickle.dumps(_Runs(mark))
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(data)


def _plant_pickle_alone(folder: Path, mark: Path) -> None:
    _plant_pickle_beside(folder, mark)
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _plant_pickle_renamed(folder: Path, mark: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(pickle.dumps(_Runs(mark)))


def _plant_kernel(folder: Path, _mark: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))


def _plant_template(folder: Path, mark: Path) -> None:
    """Jinja that would reach Python, where a chat template is rendered or compiled."""
    text = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    (folder / "chat_template.jinja").write_text(text)


PLANTS = (
    *(_plant_classes, _plant_maps, _plant_unknown_model, _plant_pickle_beside, _plant_pickle_alone),
    *(_plant_pickle_renamed, _plant_kernel, _plant_template),
)


@pytest.fixture
def agreeable(monkeypatch):
    """Whoever asks is told yes; `asked` is how often."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.removeprefix("_plant_"))
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.soak(keep=8)
def test_no_loader_runs_code_of_a_models_folder(folders, tmp_path, agreeable, monkeypatch, loader, plant):
    name, load = LOADERS[loader]
    if loader == "judge":
        pytest.importorskip("vllm")
    hostile = shutil.copytree(folders[name], tmp_path / name)
    mark = tmp_path / "RAN"
    plant(hostile, mark)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    more = {"to": tmp_path / "to", "siglip": folders["siglip"], "llada": folders["llada"]}
    wanted = load.__code__.co_varnames[: load.__code__.co_argcount]
    try:
        load(hostile, **{key: value for key, value in more.items() if key in wanted})
    except ParaCaptionError as error:
        message = str(error)
        assert "\n" not in message and "Traceback" not in message
        assert "pass the argument `trust_remote_code=True`" not in message, "that is never an advice of ours"
    assert not mark.exists(), "code of the folder ran"
    assert agreeable == [], "somebody was asked whether to run it"


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.soak(keep=8)
def test_every_loader_of_these_takes_the_folder_as_it_was(folders, tmp_path, loader):
    name, load = LOADERS[loader]
    if loader == "judge":
        pytest.importorskip("vllm")
    more = {"to": tmp_path / "to", "siglip": folders["siglip"], "llada": folders["llada"]}
    wanted = load.__code__.co_varnames[: load.__code__.co_argcount]
    load(folders[name], **{key: value for key, value in more.items() if key in wanted})


@pytest.mark.slow
def test_the_planted_code_would_run_for_who_trusts_it(folders, tmp_path, agreeable, monkeypatch):
    from transformers import AutoTokenizer

    hostile = shutil.copytree(folders["perceptiondlm"], tmp_path / "trusted")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    _plant_classes(hostile, tmp_path / "RAN")
    with pytest.raises(Exception, match=r"."):  # the classes are empty
        AutoTokenizer.from_pretrained(hostile, trust_remote_code=True)
    assert (tmp_path / "RAN").exists()
    pickle.loads(pickle.dumps(_Runs(tmp_path / "UNPICKLED")))
    assert (tmp_path / "UNPICKLED").exists()


def test_a_segment_anything_file_with_code_in_it_is_refused(tmp_path):
    from paracaption.pipeline.models.sam import SamSegmenter

    pytest.importorskip("segment_anything")
    import torch

    whole = write_sam(tmp_path)
    state = torch.load(whole, weights_only=True)
    mark = tmp_path / "RAN"
    for content in (_Runs(mark), {**state, "more": _Runs(mark)}):
        file = tmp_path / "evil.pth"
        torch.save(content, file)
        with pytest.raises(ParaCaptionError, match="could run code; it was not loaded"):
            SamSegmenter(model=str(file), device="cpu")
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ParaCaptionError, match=r"evil\.pth"):
            SamSegmenter(model=str(file), device="cpu")
    assert not mark.exists()
