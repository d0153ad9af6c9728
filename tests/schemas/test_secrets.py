"""Secrets in configurations are found, whatever they are called, and nothing else is taken for one."""

import pickle

import pytest
from pydantic import ValidationError

from paracaption.schemas import secrets
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import one_line
from paracaption.schemas.evaluation import EvaluateConfig, Judge
from paracaption.schemas.plain import words_of
from paracaption.schemas.strict import FileContext
from paracaption.schemas.training import TrainConfig

SECRET = "hunter2SIGNED"
T = f"ghp_{'a1' * 10}"

HELD = [
    {"photos": [f"http://me:{SECRET}@127.0.0.1:80/photos"]},
    {"photos": f"https://{SECRET}@host/x"},
    {"photos": f"ftp://user:{SECRET}@host/x"},
    {"photos": f"sftp://user:{SECRET}@host/x"},
    {"photos": f"s3://AKIA:{SECRET}@bucket/x"},
    {"photos": f"simplecache::https://me:{SECRET}@host/x"},
    {"annotations": [f"http://h/panoptic.json?X-Amz-Signature={SECRET}"]},
    {"photos": f"https://acc.blob.core.windows.net/c/x?sv=2020&sig={SECRET}"},
    {"photos": f"https://storage.googleapis.com/b/x?X-Goog-Signature={SECRET}"},
    {"photos": f"https://cdn/x?Policy=a&Signature={SECRET}&Key-Pair-Id=c"},
    {"photos": f"https://h/x?access_token={SECRET}"},
    {"photos": f"https://h/x#access_token={SECRET}"},
    {"photos": f"https://h/x?a=b;token={SECRET}"},
    {"photos": "https://h/x?opaque=1a2B3c4D5e6F7g8H9i0JkLmN"},
    {"runtime_env": {"pip": ["--extra-index-url", f"https://me:{SECRET}@host/simple"]}},
    {"runtime_env": {"pip": [f"git+https://{T}@github.com/x/y"]}},
    {"runtime_env": {"working_dir": f"https://x/y.zip?token={SECRET}"}},
    {"runtime_env": {"container": {"run_options": ["--password", SECRET]}}},
    {"runtime_env": {"container": {"run_options": [f"--hf-token={SECRET}"]}}},
    {"runtime_env": {"env_vars": {"HTTPS_PROXY": f"http://me:{SECRET}@proxy:3128"}}},
    *({"runtime_env": {"env_vars": {name: SECRET}}} for name in (
        "GH_PAT", "DB_CREDENTIAL", "GOOGLE_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING", "OPENAI_API_KEY",
        "AWS_ACCESS_KEY_ID", "PG_PASS", "HF_TOKEN", "SENTRY_DSN", "AZURE_STORAGE_SAS_TOKEN", "MyApiKey",
    )),
    {"runtime_env": {"env_vars": {"FSSPEC_S3": f'{{"key": "abc", "secret": "{SECRET}"}}'}}},
    {"options": {"api_key": SECRET}},
    {"options": {"apiKey": SECRET}},
    {"options": {"hf_token": SECRET}},
    {"options": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
    {"options": {"headers": {"X-Api-Key": SECRET}}},
    {"options": {"extra_body": {"password": 12345}}},
    {"options": {"storage_options": {"account_key": SECRET}}},
    {"options": {"auth": ["me", SECRET]}},
    {"options": {"pass": {"password": SECRET}}},
    {"options": {"connection": f"Server=x;Password={SECRET};"}},
    {"options": {"arguments": f"--api-key {SECRET}"}},
    {"options": {"note": T}},
    {"options": {"note": f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}"}},
    {"options": {T: 1}},
    {"options": {"base_url": f"http://me:{SECRET}@host/v1"}},
]  # fmt: skip

OPEN = [
    {"photos": ["https://images.cocodataset.org/train2017", "s3://bucket/x", "/data/x@2", "file:///a/b@c"]},
    {"photos": "https://h/x?versionId=3sL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY"},
    {"photos": ["https://h/x?download=true", "https://h/data?id=1AbCdEfGhIjKlMnOpQrStUv2"]},
    {"options": {"api_key_env": "OPENAI_API_KEY", "max_tokens": 5, "pad_token": "<pad>", "token": None}},
    {"options": {"prompt": "Answer with one token: yes or no. The secret: none. A basic understanding."}},
    {"options": {"stop": ["<end>"], "mask_token": "<mask>", "password": "", "key": "file_name"}},
    {"options": {"compilation_config": {"inductor_passes": {"some.pass": {"a": 1}}, "pass": ["x"]}}},
    {"options": {"token": "$HF_TOKEN", "tokenizer": "org/name", "token_count": "7"}},
    {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "0", "HF_HOME": "/x", "CUDA_DEVICE": "0"}}},
    {"runtime_env": {"env_vars": {"HTTPS_PROXY": "http://proxy:3128"}, "pip": ["torch==2.4"]}},
    {"runtime_env": {"pip": ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]}},
    {"license": "CC BY 4.0, see https://creativecommons.org/licenses/by/4.0/?ref=chooser-v1"},
]


@pytest.mark.parametrize("values", HELD)
def test_a_secret_is_found_and_not_said(values):
    found = list(secrets.find(values))
    assert found and SECRET not in str(found) and T not in str([each.what for each in found])


@pytest.mark.parametrize("values", OPEN)
def test_what_is_no_secret_is_let_pass(values):
    assert list(secrets.find(values)) == []


@pytest.mark.parametrize("values", HELD[::4])
@pytest.mark.parametrize("kind", [BuildConfig, TrainConfig, EvaluateConfig, Judge])
def test_every_kind_of_configuration_with_a_secret_is_refused_without_saying_it(kind, values):
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"out": "out", "sa1b": {"paths": ["x"]}, "extra": values})
    assert SECRET not in str(refused.value) and "environment" in str(refused.value)
    assert SECRET not in str(refused.value.errors()) and SECRET not in repr(pickle.dumps(str(refused.value)))


def test_what_an_early_release_has_written_is_read():
    values = {"out": "out", "coconut": [{"photos": f"http://me:{SECRET}@host/x"}]}
    config = BuildConfig.model_validate(values, context=FileContext(ours=True))
    assert SECRET in str(config)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"GET https://me:{SECRET}@host/x?Signature={SECRET}&x=1 failed",
            "GET https://host/x?... failed",
        ),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer [secret]"),
        (f"password={SECRET}; user=me", "password=[secret]; user=me"),
        (f'{{"secret": "{SECRET}"}}', '{"secret": [secret]}'),
        (f"bad credentials {T}!", "bad credentials [secret]!"),
        ("a/x.tar@12+45: broken", "a/x.tar@12+45: broken"),
        ("http://h/x.tar@12+45: broken", "http://h/x.tar@12+45: broken"),
        ("https://h/x?download=true: 404", "https://h/x?download=true: 404"),
    ],
)
def test_a_text_is_shown_without_its_secrets(text, shown):
    assert secrets.shorten(text) == shown and secrets.shorten(shown) == shown


def test_the_values_of_secret_environment_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxypassword@proxy:1")
    error = RuntimeError(f"the server says {SECRET} via me:proxypassword")
    for shown in (secrets.shorten(str(error)), one_line(error), words_of(error)):
        assert SECRET not in shown and "proxypassword" not in shown and "the server says" in shown


@pytest.mark.parametrize("part", ["a", "=", "token", "://", "@", "?a=", "Bearer ", "-eyJ", "a_", "http://"])
@pytest.mark.soak(keep=7)
def test_no_text_takes_long(part):
    import time

    length = 100_000
    started = time.thread_time()
    secrets.shorten(part * (length // len(part)))
    list(secrets.find({"x": part * (length // len(part))}))
    assert time.thread_time() - started < 2
