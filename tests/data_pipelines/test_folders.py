"""Files and folders given by hand: what is looked at, once each, and what holds no video."""

from data_pipelines.folders import find_videos


def test_folders_are_searched_and_files_counted_once(tmp_path):
    names = ["b/film.mp4", "b/deep/a.webm", "empty.MKV", "notes.txt", ".hidden/c.mp4", "b/.d.mp4", "none/x.txt"]
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "again.mp4").symlink_to(tmp_path / "b" / "film.mp4")
    odd, twice = tmp_path / "notes.txt", tmp_path / "b" / "film.mp4"
    found = find_videos([odd, tmp_path, twice, tmp_path / "none", tmp_path / "nowhere.mp4"])
    want = ["notes.txt", "again.mp4", "empty.MKV", "b/deep/a.webm", "nowhere.mp4"]
    assert found.files == [str(tmp_path / name) for name in want]
    assert list(found.failed) == [str(tmp_path / "none")] and found.total == 6
    assert "no video in this folder" in found.failed[str(tmp_path / "none")]
