"""The recipes of 8-bit training: where each value comes from."""

from __future__ import annotations

import subprocess
import sys

import pytest

from accelerate.settings import env
from accelerate.settings.fp8 import AORecipeKwargs, FP8RecipeKwargs, MSAMPRecipeKwargs, TERecipeKwargs

TE_DEFAULTS = {
    "use_autocast_during_eval": False,
    "margin": 0,
    "interval": 1,
    "fp8_format": "HYBRID",
    "amax_history_len": 1024,
    "amax_compute_algo": "most_recent",
    "override_linear_precision": (False, False, False),
    "use_mxfp8_block_scaling": False,
}


def test_defaults():
    assert TERecipeKwargs().to_dict() == TE_DEFAULTS
    assert MSAMPRecipeKwargs().to_dict() == {"opt_level": "O2"}
    assert FP8RecipeKwargs(backend="te").to_dict() == {"opt_level": "O2", **TE_DEFAULTS, "backend": "TE"}


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("USE_AUTOCAST_DURING_EVAL", "true", "use_autocast_during_eval", True),
        ("MARGIN", "3", "margin", 3),
        ("INTERVAL", "2", "interval", 2),
        ("FORMAT", "e4m3", "fp8_format", "E4M3"),
        ("AMAX_HISTORY_LEN", "16", "amax_history_len", 16),
        ("AMAX_COMPUTE_ALGO", "max", "amax_compute_algo", "max"),
        ("OVERRIDE_FPROP", "true", "override_linear_precision", (True, False, False)),
        ("OVERRIDE_WGRAD", "1", "override_linear_precision", (False, False, True)),
        ("USE_MXFP8_BLOCK_SCALING", "yes", "use_mxfp8_block_scaling", True),
    ],
)
def test_the_launchers_variables(variable, text, field, value):
    with env.patch_environment(**{f"ACCELERATE_FP8_{variable}": text}):
        recipe = TERecipeKwargs()
        assert getattr(recipe, field) == value
        assert recipe.to_kwargs() == {field: value}
        assert getattr(TERecipeKwargs(**{field: TE_DEFAULTS[field]}), field) == TE_DEFAULTS[field]


@pytest.mark.parametrize("given", [True, (True, True, True), [1, 1, 1]])
def test_one_override_stands_for_three(given):
    assert TERecipeKwargs(override_linear_precision=given).override_linear_precision == (True, True, True)


def test_false_as_documented():
    assert TERecipeKwargs(override_linear_precision=False).to_kwargs() == {}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("fp8_format", "E3M4", "one of HYBRID, E4M3, E5M2, found 'E3M4'"),
        ("amax_compute_algo", "mean", "one of max, most_recent, found 'mean'"),
        ("margin", "much", "a whole number, found 'much'"),
        ("interval", 0, "at least 1, found 0"),
        ("override_linear_precision", (True, False), "three times true or false"),
    ],
)
def test_values_that_cannot_be(field, value, expected):
    with pytest.raises(ValueError, match=f"{field}: expected {expected}"):
        TERecipeKwargs(**{field: value})


def test_a_variable_that_cannot_be():
    with (
        env.patch_environment(ACCELERATE_FP8_MARGIN="much"),
        pytest.raises(ValueError, match="environment variable ACCELERATE_FP8_MARGIN: expected a whole number"),
    ):
        TERecipeKwargs()


class TestFP8RecipeKwargs:
    def test_it_is_both(self):
        recipe = FP8RecipeKwargs(backend="msamp", margin=1)
        assert isinstance(recipe, TERecipeKwargs) and isinstance(recipe, MSAMPRecipeKwargs)
        assert recipe.to_kwargs() == {"margin": 1, "backend": "MSAMP"}

    def test_the_documented_alias(self):
        recipe = FP8RecipeKwargs(backend="msamp", optimization_level="O1")
        assert recipe.opt_level == "O1"
        assert FP8RecipeKwargs(opt_level="O1", optimization_level="O1").opt_level == "O1"

    def test_alias_and_name_that_disagree(self):
        with pytest.raises(ValueError, match="opt_level='O1' and optimization_level='O2' are two names of one setting"):
            FP8RecipeKwargs(opt_level="O1", optimization_level="O2")

    def test_the_launchers_backend(self):
        assert FP8RecipeKwargs().backend == "TE"  # MS-AMP is not installed here
        with env.patch_environment(ACCELERATE_FP8_BACKEND="MSAMP", ACCELERATE_FP8_OPT_LEVEL="O1"):
            assert FP8RecipeKwargs().backend == "MSAMP"
            assert FP8RecipeKwargs().opt_level == "O1"
            assert FP8RecipeKwargs(backend="te").backend == "TE"

    def test_torchao_has_a_recipe_of_its_own(self):
        with pytest.raises(ValueError, match=r"for torchao pass AORecipeKwargs\(\)"):
            FP8RecipeKwargs(backend="AO")


FAKE_TORCHAO = """
from dataclasses import dataclass

@dataclass
class Float8LinearConfig:
    pad_inner_dim: bool = False
    enable_fsdp_float8_all_gather: bool = False
"""


class TestAORecipeKwargs:
    """torchao is not among the packages of the tests: a module with its configuration stands in for it."""

    @pytest.fixture
    def torchao(self, tmp_path, monkeypatch):
        package = tmp_path / "torchao"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "float8.py").write_text(FAKE_TORCHAO)
        monkeypatch.syspath_prepend(tmp_path)
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:
            if name.startswith("torchao"):
                del sys.modules[name]

    def test_without_torchao(self):
        code = "import sys; sys.modules['torchao'] = None\nfrom accelerate.settings.fp8 import *\nAORecipeKwargs()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "ImportError: AORecipeKwargs needs torchao 0.6.1 or later: `pip install torchao`." in done.stderr

    def test_it_builds_the_configuration(self, torchao):
        recipe = AORecipeKwargs()
        assert recipe.config.pad_inner_dim and recipe.config.enable_fsdp_float8_all_gather
        with env.patch_environment(ACCELERATE_FP8_PAD_INNER_DIM="false"):
            assert not AORecipeKwargs().config.pad_inner_dim
        assert not AORecipeKwargs(enable_fsdp_float8_all_gather=False).config.enable_fsdp_float8_all_gather

    def test_a_configuration_of_ones_own(self, torchao):
        import torchao.float8

        config = torchao.float8.Float8LinearConfig(pad_inner_dim=True)
        recipe = AORecipeKwargs(config=config)
        assert recipe.config is config
        assert (recipe.pad_inner_dim, recipe.enable_fsdp_float8_all_gather) == (True, False)
        with pytest.raises(ValueError, match="config comes with pad_inner_dim: set that on the config"):
            AORecipeKwargs(config=config, pad_inner_dim=True)
