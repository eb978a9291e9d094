"""What is wrong with masks that are asked for, told before data is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cli.helpers import Result, check_failure, tree


def test_a_run_that_has_done_nothing_leaves_nothing(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    flags = ("--sparsify", "wanda", "--sparsity", "0.5", "--text", tmp_path / "there is none")
    check_failure(run("compile", dense, "-o", tmp_path / "slim", *flags), "does not exist")
    assert tree(tmp_path) == []


def test_what_is_wrong_with_the_flags_is_said_before_the_model_is_opened(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    for flags, message in (
        (("--sparsity", "50%"), "say what to remove"),
        (("--sparsify", "wanda"), "give one of sparsity (50%) and pattern"),
        (("--sparsify", "wand", "--sparsity", "50%"), "did you mean 'wanda'?"),
        (("--sparsify", "wanda", "--pattern", "4:2"), "keeps n of every m weights"),
        (("--sparsify", "wanda", "--sparsity", "50%", "--bits", 4), "only sparsegpt quantises"),
        (("--sparsify", "ria", "--pattern", "2:4", "--budget", "owl"), "a pattern fixes"),
    ):
        result = run("compile", "no such model", "-o", tmp_path / "x", *flags)
        assert result.code in (1, 2)
        assert message in " ".join(result.err.split()), (flags, result.err)
        assert "no such model" not in result.err


def test_a_glob_that_means_nothing_is_said_before_data_is_read(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    flags = ("--sparsify", "wanda", "--sparsity", "50%", "--exclude", "*.layer.0.*")
    result = run("compile", dense, "-o", tmp_path / "slim", *flags)
    check_failure(result, "no parameter matches '*.layer.0.*'")
    assert "reading" not in result.err
