"""Whoever ran `mergekit-yaml RECIPE OUT` with any of its options changes the first word."""

import warnings

import pytest
from test_merge_command import content_of, write_case, write_recipe

from jaxtune.cli import build_parser, main
from jaxtune.commands.mergekit_flags import REFUSED


def options_of_mergekit():
    """(option, whether it takes a value) of the program."""
    pytest.importorskip("mergekit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.scripts.run_yaml import main as program
    return [
        (option, not (one.is_flag or one.count))
        for one in program.params
        for option in (*one.opts, *one.secondary_opts)
        if option.startswith("-")
    ]


def test_every_option_of_mergekit_is_understood_or_refused_with_a_reason(tmp_path, capsys):
    given = {"--device": "cpu", "--out-shard-size": "5B", "--transformers-cache": str(tmp_path)}
    found = options_of_mergekit()
    assert len(found) > 30
    for option, takes_value in found:
        words = [option, given.get(option, "1")] if takes_value else [option]
        build_parser().parse_args(["merge", "recipe.yml", "out", *words])
    for option in REFUSED:
        assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), option]) == 2
        assert f"{option} is not done here" in capsys.readouterr().err


def test_the_place_may_stand_behind_the_recipe(tmp_path, capsys):
    recipe = write_recipe(write_case(tmp_path), "dare_ties", parameters={"density": 0.4})
    words = ["--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle", "-v", "--no-cuda", "--quiet"]
    assert main(["merge", str(recipe), str(tmp_path / "one" / "out"), *words]) == 0
    said = capsys.readouterr().err
    assert "--allow-crimes has no effect" in said
    assert "--out-shard-size has no effect: files are cut as the base's" in said
    assert "lazy" not in said
    assert main(["merge", str(recipe), "--out", str(tmp_path / "two" / "out")]) == 0
    assert content_of(tmp_path / "one" / "out") == content_of(tmp_path / "two" / "out")
    assert main(["merge", str(recipe), str(tmp_path / "three"), "--out", str(tmp_path / "four")]) == 2
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("count", ["0", "-2"])
def test_a_merge_takes_a_thread_at_least(count, tmp_path, capsys):
    recipe = write_recipe(write_case(tmp_path))
    assert main(["merge", str(recipe), str(tmp_path / "out"), "-j", count]) == 2
    assert f"--threads {count}: expected at least 1" in capsys.readouterr().err


def test_a_seed_on_the_command_line_is_that_of_the_recipe(tmp_path):
    recipe = write_recipe(write_case(tmp_path), "dare_ties", parameters={"density": 0.4}, seed=1)
    assert main(["merge", str(recipe), str(tmp_path / "seven" / "out"), "--random-seed", "7"]) == 0
    same = write_recipe(tmp_path, "dare_ties", parameters={"density": 0.4}, seed=7)
    assert main(["merge", str(same), str(tmp_path / "out")]) == 0
    expected = content_of(tmp_path / "out")
    assert content_of(tmp_path / "seven" / "out") == expected
    other = write_recipe(tmp_path, "dare_ties", parameters={"density": 0.4}, seed=1)
    assert main(["merge", str(other), str(tmp_path / "one" / "out")]) == 0
    assert content_of(tmp_path / "one" / "out")["README.md"] != expected["README.md"]
    differing = [name for name, data in content_of(tmp_path / "one" / "out").items() if data != expected[name]]
    assert any(name.endswith(".safetensors") for name in differing)
