"""Every backend of ours declares its options once, and refuses others in the same words."""

import pytest

from paracaption.pipeline.models import registry
from paracaption.pipeline.models.options import BackendOptions, read_options
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError

OURS = [(protocol, name) for protocol, backends in registry.BACKENDS.items() for name in backends]


@pytest.mark.parametrize(("protocol", "name"), OURS)
def test_every_backend_refuses_an_unknown_option_and_lists_its_own(protocol, name):
    backend = Backend(name=name, options={"no_such_option": "a-value"})
    for attempt in (registry.backend_identity, registry.load_backend):
        with pytest.raises(
            ConfigError, match=rf"{protocol}\.options: .*`no_such_option`; (the|it)"
        ) as refused:
            attempt(protocol, backend)
        assert "a-value" not in str(refused.value)


def test_an_option_of_the_wrong_type_is_named_without_its_value():
    class Options(BackendOptions, frozen=True):
        size: int = 1

    with pytest.raises(ConfigError) as refused:
        read_options(Options, {"size": "sk-secret"}, "judge.options")
    assert str(refused.value) == "judge.options.size: Expected `int`, got `str`; the options are size"


def test_a_registered_backend_can_be_imported_and_has_an_identity():
    for protocol, name in OURS:
        assert hasattr(registry.find_backend(protocol, Backend(name=name)), "identity")
