import pytest

from openinteractions.errors import SetupError
from openinteractions.models.local import catalog


def test_every_carrier_is_pinned_and_every_file_has_a_publishers_checksum():
    for weights in catalog.catalog().values():
        assert len(weights.sha256) == 64
        assert weights.licence == "Apache-2.0"
        assert weights.carriers
        assert all(len(carrier.sha256) == 64 and carrier.version for carrier in weights.carriers)


def test_the_default_depends_on_free_memory():
    assert catalog.default_model(4 * 2**30) == "qwen2.5-coder-1.5b"
    assert catalog.default_model(4 * 2**30 - 1) == "qwen2.5-coder-0.5b"
    assert catalog.default_model(0) == "qwen2.5-coder-0.5b"


def test_free_memory_is_known_here():
    assert catalog.free_memory() > 2**20


def test_a_model_is_found_with_and_without_its_provider():
    assert catalog.find("local/smollm2-135m") is catalog.find("smollm2-135m")


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(SetupError, match=r"qwen2\.5-coder-0\.5b"):
        catalog.find("gpt-9")


def test_the_list_says_what_is_pulled(tmp_path):
    small = catalog.find("smollm2-135m")
    with (tmp_path / small.file).open("wb") as file:
        file.truncate(small.size)

    listed = {line.name: line for line in catalog.list_models(tmp_path)}

    assert listed["smollm2-135m"].pulled
    assert not listed["qwen2.5-coder-0.5b"].pulled
    assert "often wrong" in listed["qwen2.5-coder-0.5b"].label


def test_packaged_templates_exist():
    for weights in catalog.catalog().values():
        if weights.template is not None:
            assert "<|im_start|>" in catalog.template(weights.template)
