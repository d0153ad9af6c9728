"""The models that one process has loaded. Stages that ask the same backend share one."""

from __future__ import annotations

import time
from typing import Any

from ..models import registry
from ..stages.base import ModelStage
from ..stages.evidence import digest


class LoadedModels:
    """Models by their backend: whichever stage of whichever subset loads one, all that name it have it."""

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def key(self, stage: ModelStage) -> str:
        """What stages that share a model have in common: protocol, backend and its options."""
        return digest(stage.protocol, stage.backend.name, stage.backend.options)

    def get(self, stage: ModelStage) -> Any | None:
        """The stage's model; None if it is not loaded."""
        return self._models.get(self.key(stage))

    def load(self, stage: ModelStage) -> Any:
        """Load the stage's model; an older one is freed first."""
        start = time.perf_counter()
        self.drop(stage)
        model = registry.load_backend(stage.protocol, stage.backend)
        self.put(stage, model, time.perf_counter() - start)
        return model

    def put(self, stage: ModelStage, model: Any, seconds: float = 0.0) -> None:
        """Take a model as the stage's; `seconds` is how long it took to load."""
        self._models[self.key(stage)], self._seconds[self.key(stage)] = model, seconds

    def drop(self, stage: ModelStage) -> None:
        """Forget the stage's model; who asks it next loads another one."""
        self._models.pop(self.key(stage), None)

    def seconds(self, stage: ModelStage) -> float:
        """How long it took to load the stage's model, which is loaded."""
        return self._seconds[self.key(stage)]

    def close(self) -> None:
        """Close the models that hold more than memory, as engines do."""
        while self._models:
            _, model = self._models.popitem()
            if hasattr(model, "close"):
                model.close()
