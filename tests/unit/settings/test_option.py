"""One declaration gives flag, key, variable and default; values are converted and checked once."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import Section, Settings, SettingsError, build, option, option_specs, section


class Oven(Settings):
    section: ClassVar[Section] = Section("Oven", "oven_config", "oven_", variables="OVEN_", enabled_by="bake")

    degrees: int = option(180, "how hot", minimum=50)
    fan: bool = option(False, "air moves")
    mode: str | None = option(None, "which heat", choices=("no", "top", "Bottom"), keys=("heat",))
    pan: str | None = option(None, "which pan", env="PAN_NAME")
    note: str | None = option(None, "for people only", env="")


class Kitchen(Settings):
    bake: bool = option(False, "use the oven", switch=True, flags=("-b",), env="KITCHEN_BAKE")
    guests: int | None = option(None, "how many eat", group="People", key="people")
    names: tuple[str, ...] = option((), "who eats")
    dry: tuple[bool, bool, bool] = option((False, False, False), "plates, cups, forks")
    weight: float = option(0.5, "in kilograms")
    oven: Oven = section(Oven)
    dish: str = ""


BY_DEST = {entry.dest: entry for entry in option_specs(Kitchen)}


def test_one_declaration_gives_every_spelling() -> None:
    degrees = BY_DEST["oven_degrees"]
    assert degrees.flags == ("--oven_degrees",)
    assert degrees.group == "Oven"
    assert degrees.variable == "OVEN_DEGREES"
    assert degrees.key == "oven_degrees"
    assert degrees.keys == ("oven_degrees", "degrees")
    assert degrees.option.default == 180
    assert BY_DEST["oven_mode"].keys == ("oven_mode", "mode", "heat")
    assert BY_DEST["oven_pan"].variable == "PAN_NAME"
    assert BY_DEST["oven_note"].variable is None
    assert BY_DEST["bake"].flags == ("--bake", "-b")
    assert BY_DEST["guests"].group == "People" and BY_DEST["guests"].key == "people"
    assert BY_DEST["guests"].variable is None


def test_fields_that_are_no_options_have_no_entry() -> None:
    assert "dish" not in BY_DEST


@pytest.mark.parametrize(
    ("dest", "written", "value"),
    [
        ("oven_degrees", "200", 200),
        ("oven_degrees", 200, 200),
        ("weight", "1.5", 1.5),
        ("weight", 2, 2.0),
        ("oven_fan", "TRUE", True),
        ("oven_fan", "no", False),
        ("oven_fan", True, True),
        ("oven_fan", 0, False),
        ("oven_mode", "TOP", "top"),
        ("oven_mode", "bottom", "Bottom"),
        ("oven_mode", False, "no"),
        ("oven_pan", 3, "3"),
        ("oven_pan", ["a", "b"], "a,b"),
        ("oven_pan", False, "false"),
        ("names", "Ada", ("Ada",)),
        ("names", ["Ada", "Bo"], ("Ada", "Bo")),
        ("dry", "true,false,true", (True, False, True)),
        ("dry", "(True, False, True)", (True, False, True)),
        ("dry", [0, 1, 0], (False, True, False)),
        ("dry", False, (False, False, False)),
        ("dry", "true", (True, True, True)),
    ],
)
def test_values_are_converted(dest: str, written: Any, value: Any) -> None:
    converted = BY_DEST[dest].convert(written, "here")
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("dest", "written", "expected"),
    [
        ("oven_degrees", "hot", "expected a whole number, found 'hot'"),
        ("oven_degrees", "1.5", "expected a whole number"),
        ("oven_degrees", True, "expected a whole number"),
        ("oven_degrees", "20", "expected at least 50, found '20'"),
        ("oven_degrees", {}, "expected a whole number"),
        ("weight", "heavy", "expected a number"),
        ("weight", None, "expected a number"),
        ("oven_fan", "perhaps", "expected true or false"),
        ("oven_fan", 2, "expected true or false"),
        ("oven_mode", "left", "expected one of no, top, Bottom, found 'left'"),
        ("oven_pan", {"a": 1}, "expected a word"),
        ("names", 3, "expected a list of words"),
        ("dry", "true,false", "three times true or false"),
        ("dry", "a,b,c", "three times true or false"),
    ],
)
def test_a_wrong_value_is_one_message_with_its_place(dest: str, written: Any, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        BY_DEST[dest].convert(written, "kitchen.yaml: oven")
    assert str(caught.value).startswith("kitchen.yaml: oven: ")
    assert expected in str(caught.value)


def test_variables_are_rendered_as_text() -> None:
    assert BY_DEST["oven_fan"].render(True) == "true"
    assert BY_DEST["oven_degrees"].render(180) == "180"
    assert BY_DEST["names"].render(("a", "b")) == "a,b"
    upper = Section("Upper", truth=("True", "False"))
    assert BY_DEST["oven_fan"]._replace(section=upper).render(False) == "False"


def test_build_puts_values_where_they_belong() -> None:
    made = build(Kitchen, {"guests": 4, "oven_degrees": 220}, dish="pie")
    assert (made.guests, made.oven.degrees, made.oven.fan, made.dish) == (4, 220, False, "pie")
    assert [entry.get(made) for entry in option_specs(Kitchen) if entry.dest == "oven_degrees"] == [220]


def test_settings_are_frozen_values() -> None:
    made = Kitchen(guests=2)
    assert made == Kitchen(guests=2) and hash(made) == hash(Kitchen(guests=2))
    assert made != Kitchen() and made != "Kitchen"
    assert made.replace(guests=3) == Kitchen(guests=3) and made.guests == 2
    assert made.oven == Oven() and made.oven != Oven(degrees=100)
    assert "guests=2" in repr(made)
    with pytest.raises(AttributeError, match=r"replace\(guests="):
        made.guests = 5
    with pytest.raises(TypeError, match="no field quests"):
        Kitchen(quests=1)


def test_every_launch_option_has_help_and_a_type() -> None:
    for entry in option_specs(LaunchSettings):
        assert entry.option.help, entry.dest
        if entry.option.default not in (None, ()):
            assert entry.convert(entry.option.default, entry.dest) == entry.option.default, entry.dest


def test_no_two_launch_options_share_a_spelling() -> None:
    spellings = [flag for entry in option_specs(LaunchSettings) for flag in (*entry.flags, entry.option.off) if flag]
    assert len(spellings) == len(set(spellings))
    assert len({entry.dest for entry in option_specs(LaunchSettings)}) == len(option_specs(LaunchSettings))
