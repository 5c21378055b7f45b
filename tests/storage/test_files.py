"""Files that are there whole or not at all."""

import pytest

from distill_lightning.storage import sweep_partial, whole_file, write_whole


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with whole_file(path) as partial:
        # Some libraries choose the format by the suffix.
        assert partial.suffix == ".csv"
        partial.write_text("half")
        assert path.read_text() == "before"
        partial.write_text("all")
    assert path.read_text() == "all"
    write_whole(path, [b"in ", b"", b"parts"])
    assert path.read_text() == "in parts"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("started", [False, True])
def test_nothing_is_left_of_a_file_that_failed(tmp_path, started):
    path = tmp_path / "table.csv"
    path.write_text("before")

    def fail():
        with whole_file(path) as partial:
            if started:
                partial.write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_was_being_written_of_the_named_files_is_swept(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    names = ["partial.0.x.csv", "partial.csv", "x.csv", "a/partial.1.x.csv", "a/partial.1.y.pt", "a/b/partial.2.x.csv"]

    def left(*patterns):
        for name in names:
            (tmp_path / name).touch()
        sweep_partial(tmp_path, *patterns)
        return [name for name in names if (tmp_path / name).exists()]

    assert left() == names
    assert left("x.csv") == names[1:]
    assert left("x.csv", "a/*.pt") == ["partial.csv", "x.csv", "a/partial.1.x.csv", "a/b/partial.2.x.csv"]
    assert left("**/*") == ["partial.csv", "x.csv"]
