"""Files that users name: what is refused, and what a failure leaves behind."""

import errno
import json
import os
import socket
import stat
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_diffgemma import files
from mlx_diffgemma.bounded_json import parse_json
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import (
    WriteError,
    check_file,
    check_folder,
    decode,
    expand_path,
    list_files,
    open_binary,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    replacing,
    write_bytes,
    write_json,
    write_text,
)
from mlx_diffgemma.safetensors import write_tensors

BOM = b"\xef\xbb\xbf"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestReading:
    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path):
        (tmp_path / "x").write_bytes(BOM + b"text")
        assert read_text(tmp_path / "x") == "text"

    def test_nor_of_json_and_of_lines(self, tmp_path):
        (tmp_path / "x").write_bytes(BOM + b'{"a": 1}\n{"a": 2}')
        assert list(read_lines(tmp_path / "x", lambda value: value["a"])) == [1, 2]
        (tmp_path / "x").write_bytes(BOM + b'{"a": 1}')
        assert read_json(tmp_path / "x") == {"a": 1}

    @pytest.mark.parametrize("mark", [b"", BOM])
    def test_what_is_not_utf8_is_told_with_its_line(self, tmp_path, mark):
        (tmp_path / "x").write_bytes(mark + b"1\ncaf\xe9\n")
        with pytest.raises(UserError, match="x is not UTF-8: line 2 holds the byte 0xe9"):
            read_text(tmp_path / "x")
        with pytest.raises(UserError, match="x is not UTF-8: line 2 holds the byte 0xe9"):
            list(read_lines(tmp_path / "x", lambda value: value))

    def test_utf16_is_told(self):
        with pytest.raises(UserError, match="it is UTF-16"):
            decode("text".encode("utf-16"), "it")

    def test_a_named_pipe_is_refused_at_once(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="is a named pipe"):
            read_bytes(tmp_path / "pipe")

    def test_a_pipe_of_the_shell_is_read(self):
        reader, writer = os.pipe()
        os.write(writer, b"text")
        os.close(writer)
        try:
            assert read_text(Path(f"/dev/fd/{reader}")) == "text"
        finally:
            os.close(reader)

    def test_a_pipe_of_the_shell_has_a_limit_too(self):
        reader, writer = os.pipe()
        os.write(writer, b"text")
        os.close(writer)
        try:
            with pytest.raises(UserError, match="more than the 3 bytes"):
                read_text(Path(f"/dev/fd/{reader}"), limit=3)
        finally:
            os.close(reader)

    def test_what_is_no_file_is_refused(self, tmp_path):
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="is a folder"):
            read_text(tmp_path)
        with pytest.raises(UserError, match="is a device"):
            read_text(Path("/dev/zero"))
        with pytest.raises(UserError, match="cannot be read"):
            read_text(tmp_path / "s")
        listening.close()

    @pytest.mark.parametrize("name", ["none", "a\0b", "x" * 300])
    def test_what_cannot_be_opened_is_told(self, tmp_path, name):
        with pytest.raises(UserError, match="cannot be read|is not the path of a file"):
            read_text(tmp_path / name)

    def test_a_limit_is_inclusive(self, tmp_path):
        (tmp_path / "x").write_bytes(b"1234")
        assert read_bytes(tmp_path / "x", limit=4) == b"1234"
        with pytest.raises(UserError, match="more than the 3 bytes"):
            read_bytes(tmp_path / "x", limit=3)

    def test_an_error_of_reading_is_told(self, tmp_path):
        (tmp_path / "x").write_bytes(b"1234")
        with pytest.raises(UserError, match="Input/output error"), open_binary(tmp_path / "x"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def test_apple_doubles_are_no_files(self, tmp_path):
        for name in ("b.json", "._b.json", "a.json"):
            (tmp_path / name).touch()
        assert [path.name for path in list_files(tmp_path, "*.json")] == ["a.json", "b.json"]


class TestJson:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[" * 100_000 + "]" * 100_000, "deeper than 100 levels"),
            ("[" * 101 + "]" * 101, "deeper than 100 levels"),
            ('{"a":' * 101 + "1" + "}" * 101, "deeper than 100 levels"),
            ("1" * 5000, "a number has 5,000 digits"),
            ("[1e999]", "the number 1e999 is out of range"),
            ("-1e999", "the number -1e999 is out of range"),
            ("NaN", "NaN is no number"),
            ("[Infinity]", "Infinity is no number"),
            ('{"a": 1,\n "b": }', "line 2, column 7"),
            ("{", "column 2"),
            ("", "column 1"),
        ],
    )
    def test_refused_with_name_and_reason(self, text, reason):
        with pytest.raises(UserError, match=f"^it is not valid JSON .*{reason}"):
            parse_json(text, "it")

    def test_the_bounds_are_inclusive(self):
        parse_json("[" * 100 + "]" * 100, "it")
        assert parse_json("1" * 400, "it") == int("1" * 400)

    def test_brackets_in_texts_are_no_nesting(self):
        assert parse_json(json.dumps(["[" * 500]), "it") == ["[" * 500]
        assert parse_json(json.dumps([[]] * 500), "it") == [[]] * 500

    def test_lines_are_told_by_their_number(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text('1\n\n{"a": \n')
        with pytest.raises(UserError, match=r"x.jsonl, line 3: not valid JSON .*column"):
            list(read_lines(path, lambda value: value))
        path.write_text("1\n" + "[" * 5000 + "\n")
        with pytest.raises(UserError, match=r"x.jsonl, line 2: not valid JSON .*deeper"):
            list(read_lines(path, lambda value: value))

    def test_lines_end_at_newlines_alone(self, tmp_path):
        (tmp_path / "x").write_text('"a\u2028b"\r\n"c\x85d"\n', encoding="utf-8", newline="")
        assert list(read_lines(tmp_path / "x", lambda value: value)) == ["a\u2028b", "c\x85d"]

    def test_a_line_has_a_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "LINE_LIMIT", 10)
        (tmp_path / "x").write_text('"1234567"\n"12345678901"\n')
        with pytest.raises(UserError, match="line 2 has more than the 10 bytes"):
            list(read_lines(tmp_path / "x", lambda value: value))

    def test_only_an_object_is_a_config(self, tmp_path):
        (tmp_path / "x").write_text("[]")
        with pytest.raises(UserError, match="holds no JSON object"):
            read_json(tmp_path / "x")
        with pytest.raises(UserError, match="has no config.json"):
            read_json(tmp_path / "config.json")


class TestPaths:
    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("~/x", "/home/me/x"),
            ("file:///a%20b/c", "/a b/c"),
            ("file://localhost/a", "/a"),
            ("FILE:///a", "/a"),
            (Path("file:///a"), "/a"),
            ("file:a", "file:a"),
            ("./~", "~"),
            ("a/b", "a/b"),
        ],
    )
    def test_what_a_user_means(self, monkeypatch, name, path):
        monkeypatch.setenv("HOME", "/home/me")
        assert expand_path(name) == Path(path)

    def test_the_home_of_nobody(self):
        with pytest.raises(UserError, match="is not the path of a file: there is no such user"):
            expand_path("~nobody-of-this-name/x")


def fail(monkeypatch, name, number=errno.ENOSPC):
    """Let a call of the system fail, as on a full disk."""

    def failing(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, failing)


class TestWriting:
    def test_the_content_is_replaced(self, tmp_path):
        write_text(tmp_path / "x", "äö")
        write_text(tmp_path / "x", "ü")
        assert (tmp_path / "x").read_text(encoding="utf-8") == "ü"
        assert names(tmp_path) == ["x"]

    @pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
    def test_a_full_disk_leaves_the_old_file_whole(self, tmp_path, monkeypatch, call):
        (tmp_path / "x").write_text("old")
        fail(monkeypatch, call)
        with pytest.raises(UserError, match="x cannot be written .No space left on device"):
            write_text(tmp_path / "x", "new")
        assert (tmp_path / "x").read_text() == "old"
        assert names(tmp_path) == ["x"]

    def test_so_does_a_write_that_fails_halfway(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with open("/dev/full", "wb", buffering=0) as full:

            def write():
                with replacing(tmp_path / "x") as file:
                    file.write(b"new")
                    full.write(b"more")

            with pytest.raises(UserError, match="No space"):
                write()
        assert (tmp_path / "x").read_text() == "old"
        assert names(tmp_path) == ["x"]

    def test_and_an_interruption(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x"):
            raise KeyboardInterrupt
        assert (tmp_path / "x").read_text() == "old"
        assert names(tmp_path) == ["x"]

    def test_permissions_stay(self, tmp_path):
        (tmp_path / "x").write_text("old")
        (tmp_path / "x").chmod(0o751)
        write_text(tmp_path / "x", "new")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o751

    def test_a_new_file_has_the_usual_ones(self, tmp_path):
        (tmp_path / "usual").touch()
        write_text(tmp_path / "x", "new")
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "far").mkdir()
        (tmp_path / "far" / "x").write_text("old")
        (tmp_path / "link").symlink_to("far/x")
        write_text(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "x").read_text() == "new"
        assert names(tmp_path) == ["far", "link"]

    def test_a_change_meanwhile_is_kept(self, tmp_path):
        (tmp_path / "x").write_text("saved by an editor")
        with pytest.raises(UserError, match="was changed by something else"):
            write_bytes(tmp_path / "x", b"new", expected=b"old")
        assert (tmp_path / "x").read_text() == "saved by an editor"
        with pytest.raises(UserError, match="was changed by something else"):
            write_bytes(tmp_path / "gone", b"new", expected=b"old")
        assert names(tmp_path) == ["x"]

    def test_what_is_no_file_is_not_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for name, kind in (("pipe", "a named pipe"), ("folder", "a folder")):
            with pytest.raises(UserError, match=f"{name} is {kind} and cannot be written"):
                write_text(tmp_path / name, "new")
        with pytest.raises(UserError, match="is a device"):
            write_text(Path("/dev/null"), "new")
        assert names(tmp_path) == ["folder", "pipe"]

    def test_a_read_only_file_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "x").write_text("old")
        # root may write everything
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(UserError, match="it is read-only"):
            write_text(tmp_path / "x", "new")

    @pytest.mark.parametrize("name", ["none/x", "a\0b", "x" * 300])
    def test_what_cannot_be_made_is_told(self, tmp_path, name):
        with pytest.raises(UserError, match="cannot be written|is not the path of a file"):
            write_text(tmp_path / name, "new")
        with pytest.raises(UserError, match="cannot be written|is not the path of a file"):
            check_file(tmp_path / name)

    def test_tensors_go_to_a_file_of_any_name(self, tmp_path):
        (tmp_path / "x.safetensors").write_text("another's")
        write_tensors(tmp_path / "x", {"a": mx.arange(3).astype(mx.bfloat16)}, {"of": "us"})
        found, metadata = mx.load(str(tmp_path / "x"), format="safetensors", return_metadata=True)
        assert found["a"].tolist() == [0, 1, 2]
        assert found["a"].dtype == mx.bfloat16
        assert metadata == {"of": "us"}
        assert (tmp_path / "x.safetensors").read_text() == "another's"
        assert names(tmp_path) == ["x", "x.safetensors"]

    def test_json_ends_with_a_newline(self, tmp_path):
        write_json(tmp_path / "x", {"a": "ä"})
        assert (tmp_path / "x").read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'


class TestTargets:
    def test_a_file_that_can_be_written(self, tmp_path):
        check_file(tmp_path / "x")
        (tmp_path / "x").write_text("old")
        check_file(tmp_path / "x")
        assert names(tmp_path) == ["x"]
        assert (tmp_path / "x").read_text() == "old"

    def test_a_folder_in_place_of_a_file(self, tmp_path):
        with pytest.raises(UserError, match="is a folder"):
            check_file(tmp_path)

    def test_a_folder_that_can_be_made(self, tmp_path):
        check_folder(tmp_path / "a" / "b")
        assert names(tmp_path) == []

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "x").touch()
        (tmp_path / "dangling").symlink_to("nowhere")
        for name, what in (("x", "a file"), ("x/y", "a file"), ("dangling/y", "a link to nothing")):
            with pytest.raises(UserError, match=f"cannot be made, .* is {what}"):
                check_folder(tmp_path / name)

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        fail(monkeypatch, "open", errno.EROFS)
        with pytest.raises(UserError, match="Read-only file system"):
            check_folder(tmp_path / "a")
        with pytest.raises(UserError, match="Read-only file system"):
            check_file(tmp_path / "a")

    def test_files_of_others_stay(self, tmp_path):
        (tmp_path / ".hidden").touch()
        check_folder(tmp_path, ours=["state"])
        (tmp_path / "config.json").write_text("another's")
        with pytest.raises(UserError, match=r"did not write, such as config.json"):
            check_folder(tmp_path, ours=["state"])
        check_folder(tmp_path)
        (tmp_path / "state").touch()
        check_folder(tmp_path, ours=["state"])

    def test_the_systems_reason_is_kept(self, tmp_path, monkeypatch):
        fail(monkeypatch, "fsync")
        with pytest.raises(WriteError) as told:
            write_text(tmp_path / "x", "new")
        assert told.value.errno == errno.ENOSPC
