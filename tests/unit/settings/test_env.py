"""The environment: what counts as true, how it is patched, and that it comes back."""

from __future__ import annotations

import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.settings import env

NAMES = st.from_regex(r"TEST_[A-Z]{1,8}", fullmatch=True)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


@given(st.dictionaries(NAMES, TEXTS, max_size=4), st.dictionaries(NAMES, TEXTS, max_size=4))
def test_patching_restores_what_was_there(before, inside):
    env.publish(before)
    try:
        whole = env.snapshot()
        with env.patch_environment(**inside):
            assert {name: os.environ[name] for name in inside} == inside
        assert env.snapshot() == whole
    finally:
        env.publish(dict.fromkeys(before))


def test_patching_restores_after_an_error():
    with pytest.raises(RuntimeError), env.patch_environment(test_one=1):
        raise RuntimeError
    assert env.get("TEST_ONE") is None


def test_clearing():
    env.publish({"TEST_ONE": 1})
    with env.clear_environment():
        assert env.snapshot() == {}
        os.environ["TEST_TWO"] = "2"
    assert env.get("TEST_ONE") == "1" and env.get("TEST_TWO") is None


@pytest.mark.parametrize(("text", "value"), [("", True), ("no", False), ("ON", True), ("0", False)])
def test_flags(text, value):
    with env.patch_environment(TEST_FLAG=text):
        assert env.flag("TEST_FLAG", default=True) is value
        assert env.parse_flag_from_env("TEST_FLAG", True) is value


def test_unreadable_values_are_named():
    with env.patch_environment(TEST_FLAG="maybe", TEST_NUMBER="many"):
        with pytest.raises(ValueError, match="environment variable TEST_FLAG: 'maybe' is neither true nor false"):
            env.flag("TEST_FLAG")
        with pytest.raises(ValueError, match="environment variable TEST_NUMBER: expected an integer, found 'many'"):
            env.integer("TEST_NUMBER", 0)


def test_the_first_variable_that_is_set_counts():
    with env.patch_environment(TEST_A="", TEST_B="-1", TEST_C="3"):
        assert env.integer(("TEST_A", "TEST_B", "TEST_C"), 7) == -1
        assert env.get_int_from_env(["TEST_A", "TEST_B", "TEST_C"], 7) == 3
        assert env.get_int_from_env(["TEST_A", "TEST_B"], 7) == 7
        assert env.parse_choice_from_env("TEST_C") == "3"
        assert env.parse_choice_from_env("TEST_D") == "no"


def test_libraries_that_are_loaded():
    assert env.are_libraries_initialized("pytest", "no_such_library") == ["pytest"]


def test_lines_for_a_file(caplog):
    with caplog.at_level(logging.WARNING):
        lines = env.convert_dict_to_env_variables({"A": 1, "B": "two words", "C": "x"})
    assert lines == ["A=1\n", "C=x\n"]
    assert "skipping variable B" in caplog.text


class TestPurging:
    def test_a_function(self):
        @env.purge_accelerate_environment
        def work(value):
            env.publish({"ACCELERATE_TEST": value, "ACCELERATE_KEPT": "changed"})
            return value

        with env.patch_environment(ACCELERATE_KEPT="old"):
            assert work("x") == "x"
            assert (env.get("ACCELERATE_TEST"), env.get("ACCELERATE_KEPT")) == (None, "old")

    def test_a_class_and_its_subclasses(self):
        @env.purge_accelerate_environment
        class Base:
            def test_one(self):
                env.publish({"ACCELERATE_TEST": 1})

            def helper(self):
                env.publish({"ACCELERATE_HELPER": 1})

        class Derived(Base):
            def test_two(self):
                env.publish({"ACCELERATE_TEST": 2})
                raise RuntimeError

        Derived().test_one()
        with pytest.raises(RuntimeError):
            Derived().test_two()
        assert env.get("ACCELERATE_TEST") is None
        Base().helper()
        assert env.get("ACCELERATE_HELPER") == "1"
