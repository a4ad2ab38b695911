"""Models that an installed package carries are found without importing it."""

import sys

import pytest

from nso_hf.running.packages import in_package


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    folder = tmp_path / "carries_a_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_names_of_packages_and_of_what_pip_installs(carrier):
    for name in ("carries_a_model", "carries-a-model"):
        assert in_package(f"package:{name}", "checkpoint") == str(carrier)
        assert in_package(f"package:{name}/model", "checkpoint") == str(carrier / "model")
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("path", ["gpt2", "./package:x", "local-dir:runs", "/models/a"])
def test_another_path_is_as_it_is(path):
    assert in_package(path, "checkpoint") == path


@pytest.mark.parametrize("name", ["", "not_there", "not.there", "token", "..", "a b"])
def test_what_is_no_package_is_refused(name):
    # `token` is a module without a folder.
    with pytest.raises(ValueError, match=r"checkpoint='package:.*no package"):
        in_package(f"package:{name}", "checkpoint")
