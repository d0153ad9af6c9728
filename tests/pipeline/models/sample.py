"""The sample corpus of the repository."""

from pathlib import Path

from paracaption.pipeline.config_file import load_config
from paracaption.schemas.config import BuildConfig

SAMPLES = Path(__file__).resolve().parents[3] / "samples"


def sample_config() -> BuildConfig:
    return load_config(SAMPLES / "build.yaml")
